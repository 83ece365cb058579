"""Compressed requests, unfolded up to a bound. Without the package zstandard a server takes plain ones only."""

from importlib.util import find_spec

ENCODINGS = ("zstd",) if find_spec("zstandard") else ()
_WINDOW_BYTES = 8 * 2**20  # what RFC 8878, section 3.1.1.1.2, asks every decoder to support


def unfold(body: bytes | bytearray, most: int) -> bytes:
    """The content of the first zstd frame.

    Raises:
        OverflowError: it has more than so many bytes; no more than that were unfolded.
        ValueError: the body is no zstd frame, or one that needs a larger window.
    """
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES)
    try:
        with decompressor.stream_reader(body) as reader:
            content = reader.read(most + 1)
    except zstandard.ZstdError as error:
        raise ValueError("no zstd frame") from error
    if len(content) > most:
        raise OverflowError(f"more than {most} bytes")
    return content
