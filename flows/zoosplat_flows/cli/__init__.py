"""The command line: arguments, options and help of each `zoosplat` command."""
