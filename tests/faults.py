"""The server of faults, where tests look for it."""

from kilocopy.faults import CHUNKED, HEAD, Server, chunk

__all__ = ["CHUNKED", "HEAD", "Server", "chunk"]
