/* Loaded with LD_PRELOAD: logs in which order a program writes, syncs and renames what lies below DISK_LOG_BELOW, to the
 * file DISK_LOG. A line is an operation and its paths, with tabs between. What makes a thing safe is logged when it is
 * done, a rename before it begins: what is logged before a rename was done before it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int below(const char *path) {
    const char *folder = getenv("DISK_LOG_BELOW");
    return folder && strncmp(path, folder, strlen(folder)) == 0;
}

static void note(const char *operation, const char *path, const char *second) {
    char line[2 * PATH_MAX + 32];
    static int file = -1;
    if (!below(path) || !getenv("DISK_LOG")) return;
    if (file < 0) file = REAL(open)(getenv("DISK_LOG"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    int n = snprintf(line, sizeof line, "%s\t%s\t%s\n", operation, path, second);
    if (REAL(write)(file, line, n) != n) abort();
}

/* Path of what a descriptor has open. */
static const char *of(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, PATH_MAX - 1);
    path[n < 0 ? 0 : n] = 0;
    return path;
}

static const char *at(int folder, const char *name, char *path) {
    char base[PATH_MAX];
    if (name[0] == '/') return name;
    if (folder == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) abort();
    } else {
        of(folder, base);
    }
    snprintf(path, 2 * PATH_MAX, "%s/%s", base, name);
    return path;
}

static void opened(int fd, int flags) {
    char path[PATH_MAX];
    if (fd >= 0 && (flags & (O_CREAT | O_TRUNC))) note("create", of(fd, path), "");
}

#define MODE(flags, last)                    \
    mode_t mode = 0;                         \
    va_list rest;                            \
    va_start(rest, last);                    \
    if ((flags) & O_CREAT) mode = va_arg(rest, mode_t); \
    va_end(rest)

int open(const char *name, int flags, ...) {
    MODE(flags, flags);
    int fd = REAL(open)(name, flags, mode);
    opened(fd, flags);
    return fd;
}

int open64(const char *name, int flags, ...) {
    MODE(flags, flags);
    int fd = REAL(open64)(name, flags, mode);
    opened(fd, flags);
    return fd;
}

int openat(int folder, const char *name, int flags, ...) {
    MODE(flags, flags);
    int fd = REAL(openat)(folder, name, flags, mode);
    opened(fd, flags);
    return fd;
}

int openat64(int folder, const char *name, int flags, ...) {
    MODE(flags, flags);
    int fd = REAL(openat64)(folder, name, flags, mode);
    opened(fd, flags);
    return fd;
}

#define NOTED(operation, call)              \
    char path[PATH_MAX];                    \
    __typeof__(call) result = call;         \
    if (result >= 0) note(operation, of(fd, path), ""); \
    return result

ssize_t write(int fd, const void *data, size_t n) { NOTED("write", REAL(write)(fd, data, n)); }
ssize_t pwrite(int fd, const void *data, size_t n, off_t from) { NOTED("write", REAL(pwrite)(fd, data, n, from)); }
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t from) { NOTED("write", REAL(pwrite64)(fd, data, n, from)); }
ssize_t writev(int fd, const struct iovec *data, int n) { NOTED("write", REAL(writev)(fd, data, n)); }
int fsync(int fd) { NOTED("sync", REAL(fsync)(fd)); }
int fdatasync(int fd) { NOTED("sync", REAL(fdatasync)(fd)); }

int renameat(int from, const char *old, int to, const char *new) {
    char a[2 * PATH_MAX], b[2 * PATH_MAX];
    note("rename", at(from, old, a), at(to, new, b));
    return REAL(renameat)(from, old, to, new);
}

int rename(const char *old, const char *new) {
    char a[2 * PATH_MAX], b[2 * PATH_MAX];
    note("rename", at(AT_FDCWD, old, a), at(AT_FDCWD, new, b));
    return REAL(rename)(old, new);
}

#define REMOVED_OR_MADE(operation, folder, name, call) \
    char path[2 * PATH_MAX];                    \
    int result = call;                          \
    if (result == 0) note(operation, at(folder, name, path), ""); \
    return result

int mkdir(const char *name, mode_t mode) { REMOVED_OR_MADE("mkdir", AT_FDCWD, name, REAL(mkdir)(name, mode)); }
int mkdirat(int folder, const char *name, mode_t mode) {
    REMOVED_OR_MADE("mkdir", folder, name, REAL(mkdirat)(folder, name, mode));
}
int unlink(const char *name) { REMOVED_OR_MADE("remove", AT_FDCWD, name, REAL(unlink)(name)); }
int rmdir(const char *name) { REMOVED_OR_MADE("remove", AT_FDCWD, name, REAL(rmdir)(name)); }
int unlinkat(int folder, const char *name, int flags) {
    REMOVED_OR_MADE("remove", folder, name, REAL(unlinkat)(folder, name, flags));
}
