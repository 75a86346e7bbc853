"""Files of masks, one entry of `data.masks` a camera: a video, or numbered pictures in a folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import av
import cv2
import numpy as np

from zoosplat.errors import Problems, UserError
from zoosplat.recording import mask_values, numbered_pictures, video
from zoosplat.recording.mask_values import Reading
from zoosplat.recording.video import Planes, VideoInfo
from zoosplat.storage import fingerprints, objects

PNG_SIGNATURE, JPEG_SIGNATURE = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
# What FFmpeg's own decoders of VP8 and VP9 leave out, those of libvpx decode: the opacity of a WebM video.
DECODERS_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# Ending of a file name -> what to do with it, for kinds of masks that are not read.
NOT_READ = {
    **dict.fromkeys((".tif", ".tiff", ".bmp", ".gif", ".webp"), "convert the masks to PNG pictures, numbered by frame"),
    **dict.fromkeys((".npy", ".npz", ".h5", ".hdf5", ".mat", ".pkl"), "write the arrays as PNG pictures, one a frame"),
    ".json": "paint the outlines or run lengths (COCO) as PNG pictures, one a frame",
    **dict.fromkeys((".zip", ".tar", ".gz"), "unpack it, and name the folder with the pictures"),
}


@dataclass(frozen=True)
class MaskInfo(VideoInfo):
    """Facts about the masks of a camera. Those of a video are as in `VideoInfo`.

    Attributes:
        url: of a video, or of numbered pictures, see `NumberedPictures.pattern`.
        width, height: pixels of the camera's video, to which smaller masks are enlarged.
        file_width, file_height: pixels of the files; None if they are the same.
        first: number of the picture of frame 0; None for a video.
        lossless: whether the pixels have the very values that were written.
        decoder: FFmpeg's name of the decoder of a video; None for the one that FFmpeg prefers.
        reading: what the pixels mean.
    """

    file_width: int | None = None
    file_height: int | None = None
    first: int | None = None
    lossless: bool = False
    decoder: str | None = None
    reading: Reading = "white"


def probe_mask(url: str, name: str, label: str, jump: int) -> MaskInfo:
    """Read what the files of an entry of `data.masks` say of themselves, without their pixels.

    Args:
        url: of a video or a folder, or of numbered pictures.
        name: the entry as it is written in the configuration.
        label: name of the entry in messages, such as `masks/3.mp4 (mask of camera 3)`.
        jump: the key `ingest.frame_jump`; there may be pictures of every so many frames only.

    Raises:
        UserError: the files are missing or unreadable, of a kind that is not read, or pictures are not numbered right.
    """
    if numbered_pictures.is_pattern(name) or _is_folder(url):
        return _probe_pictures(url, label, jump)
    lower = name.lower()
    for ending, remedy in NOT_READ.items():
        if lower.endswith(ending):
            raise UserError(f"{label}: is a {ending} file, neither a video nor a folder of PNG pictures; {remedy}")
    if lower.endswith(numbered_pictures.PICTURE_SUFFIXES):
        folder = name.rpartition("/")[0] or "."
        raise UserError(
            f"{label}: is a single picture, not a video; name the folder of the pictures ({folder}), or a pattern such "
            f"as {folder}/%05d{name[name.rindex('.') :]}"
        )
    info = video.probe(url, label)
    codec, lossless, alpha = video.inspect_codec(url)
    decoder = DECODERS_WITH_ALPHA.get(codec) if alpha else None
    if decoder is not None and decoder not in av.codecs_available:
        raise UserError(
            f"{label}: its opacity can be decoded by {decoder} alone, which FFmpeg has not here; write the masks as "
            "PNG pictures or as a video by FFV1"
        )
    return MaskInfo(**vars(info), lossless=lossless, decoder=decoder)


def _is_folder(url: str) -> bool:
    try:
        fingerprints.stat(url)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except IsADirectoryError:
        return True
    return False


def _probe_pictures(url: str, label: str, jump: int) -> MaskInfo:
    found = numbered_pictures.find_pictures(url, label)
    if found is None:
        pattern = numbered_pictures.is_pattern(url)
        what = "no such pictures" if pattern else "no such file, but a folder without PNG or JPEG pictures"
        raise UserError(f"{label}: {what}: {url}; check the names in data.masks, and convert other pictures to PNG")
    numbers = list(found.versions)
    step = jump if len(numbers) > 1 and not any(number % jump for number in numbers) else 1
    missing = found.first_missing(step)
    if missing is not None:
        raise UserError(
            f"{label}: number {missing} is missing: there are numbers from {numbers[0]} to {numbers[-1]}, but not "
            f"{numbered_pictures.picture_url(found.pattern, missing)}; add it, all black if there is no animal in it"
        )
    if numbers[0] > 1 or (step > 1 and numbers[0]):
        raise UserError(
            f"{label}: the numbers begin with {numbers[0]}; they must begin with 0 or 1, which is the video's frame 0; "
            "rename the pictures, or add those that are missing"
        )
    picture, lossless = _decode(found.pattern, numbers[0], f"{label}: frame 0")
    n = numbers[-1] - numbers[0] + 1
    return MaskInfo(
        found.pattern, label, picture.width, picture.height, n, n, 0.0, 1.0, first=numbers[0], lossless=lossless
    )


def _decode(pattern: str, number: int, where: str) -> tuple[av.VideoFrame, bool]:
    """A picture, and whether it has the very values that were written. Raises UserError, naming its file."""
    url = numbered_pictures.picture_url(pattern, number)
    try:
        data = objects.read_bytes(url)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{where}: no such file: {url}; put it back") from None
    lossless = data.startswith(PNG_SIGNATURE)
    if not lossless and not data.startswith(JPEG_SIGNATURE):
        raise UserError(f"{where}: neither PNG nor JPEG: {url}; convert it to PNG")
    decoder = av.CodecContext.create("png" if lossless else "mjpeg", "r")
    decoder.options, decoder.thread_count = {"err_detect": "crccheck+explode"}, 1
    try:
        frames = [*decoder.decode(av.Packet(data)), *decoder.decode(None)]
    except av.FFmpegError:
        frames = []
    if len(frames) != 1 or not isinstance(frames[0], av.VideoFrame) or frames[0].is_corrupt:
        raise UserError(f"{where}: damaged or cut off: {url}; export it again")
    return frames[0], lossless


# -- masks and videos together ------------------------------------------------------------------------------------
def fit_lengths(masks: Sequence[MaskInfo], videos: Sequence[VideoInfo], kept: int, jump: int) -> list[MaskInfo]:
    """Masks, of which those that have a picture of every kept frame count as long as the video of their camera.

    Args:
        masks, videos: one of each a camera.
        kept: number of the videos' frames that are kept.
        jump: the key `ingest.frame_jump`.

    Raises:
        UserError: there are as many pictures as kept frames, but they are not numbered by the frames of the video.
    """
    problems, fitted = Problems(), []
    for mask, filmed in zip(masks, videos, strict=True):
        if mask.first == 0 and mask.n_frames == (kept - 1) * jump + 1:
            mask = dataclasses.replace(mask, n_frames=filmed.n_declared, n_declared=filmed.n_declared)
        elif mask.first is not None and mask.n_frames == kept != filmed.n_frames:
            problems.lines.append(
                f"{mask.label}: has as many pictures as frames are kept, but they are not numbered by frame; number "
                f"them 0, {jump}, {2 * jump} and so on"
            )
        fitted.append(mask)
    problems.report()
    return fitted


def fit_size(mask: MaskInfo, width: int, height: int) -> MaskInfo | None:
    """A mask that is enlarged to the pixels of the video; None if its shape is another or it is larger."""
    if (mask.width, mask.height) == (width, height):
        return mask
    # The smaller size was rounded to whole pixels, on one side or the other.
    alike = abs(mask.height - height * mask.width / width) <= 1 or abs(mask.width - width * mask.height / height) <= 1
    if not alike or mask.width >= width or mask.height >= height:
        return None
    return dataclasses.replace(mask, width=width, height=height, file_width=mask.width, file_height=mask.height)


def choose_readings(masks: Sequence[MaskInfo], wanted: str | tuple[int, ...], kept: int, jump: int) -> list[MaskInfo]:
    """Masks with what their pixels mean, by some of their frames.

    Args:
        masks: one a camera.
        wanted: the key `data.mask_values`.
        kept: number of frames that are kept.
        jump: the key `ingest.frame_jump`.

    Raises:
        UserError: a line for each file that is no mask, or of which it cannot be told.
    """
    problems = Problems()

    def choose(mask: MaskInfo) -> MaskInfo | UserError:
        # Where seeking is not exact, a later frame would be reached only by decoding all before it.
        places = sorted({0, kept // 2, kept - 1}) if mask.step is not None else [0]
        try:
            frames = {0: _decode_frame(mask, 0)}
            if mask.lossless or mask_values.has_alpha(frames[0]):
                frames |= {i * jump: _decode_frame(mask, i * jump) for i in places[1:]}
            reading = mask_values.choose_reading(list(frames.values()), wanted, mask.lossless, mask.label)
            for index, frame in frames.items():
                mask_values.read_mask(frame, reading, wanted, mask.lossless, _where(mask, index))
        except UserError as error:
            return error
        return dataclasses.replace(mask, reading=reading)

    with ThreadPoolExecutor(min(len(masks), cv2.getNumberOfCPUs())) as pool:
        chosen = list(pool.map(choose, masks))
    for found in chosen:
        with problems.collect():
            if isinstance(found, UserError):
                raise found
    problems.report()
    return [found for found in chosen if isinstance(found, MaskInfo)]


def read_masks(mask: MaskInfo, start: int, stop: int, jump: int, wanted: str | tuple[int, ...]) -> Iterator[Planes]:
    """Frames `start`, `start + jump`, ... below `stop` of a camera's masks, as the camera saw them.

    Args:
        mask: of the camera.
        start, stop, jump: as of a range.
        wanted: the key `data.mask_values`.

    Yields:
        Grey levels of `mask.width` x `mask.height` pixels, of which at least half of white is the animal.

    Raises:
        UserError: a frame is missing, cannot be decoded or is no mask.
    """
    size = mask.width, mask.height
    stored = (mask.file_width or mask.width, mask.file_height or mask.height)
    for index, frame in zip(range(start, stop, jump), _decoded_frames(mask, start, stop, jump), strict=True):
        where = _where(mask, index)
        if (frame.width, frame.height) != stored:
            raise UserError(
                f"{where} has {frame.width} x {frame.height} pixels, but the first one has {stored[0]} x {stored[1]}; "
                "export it again"
            )
        planes = mask_values.read_mask(frame, mask.reading, wanted, mask.lossless, where)
        if stored != size:
            enlarged = cv2.resize(planes.y, size, interpolation=cv2.INTER_LINEAR)
            planes = dataclasses.replace(planes, y=np.asarray(enlarged, np.uint8))
        yield planes


def _decoded_frames(mask: MaskInfo, start: int, stop: int, jump: int) -> Iterator[av.VideoFrame]:
    if mask.first is None:
        yield from video.read_frames(mask, start, stop, jump, mask.decoder)
    else:
        for index in range(start, stop, jump):
            yield _decode(mask.url, mask.first + index, _where(mask, index))[0]


def _decode_frame(mask: MaskInfo, index: int) -> av.VideoFrame:
    return next(_decoded_frames(mask, index, index + 1, 1))


def _where(mask: MaskInfo, index: int) -> str:
    """Name of a frame in messages; with the number of its picture where that is another."""
    number = f" (number {index + mask.first})" if mask.first else ""
    return f"{mask.label}: frame {index}{number}"
