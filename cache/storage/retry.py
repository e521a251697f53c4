"""Requests that fail: which errors pass if one waits, and when one stops trying.

Passwords and signatures in URLs stand in no message.
"""

import errno
import logging
import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

from hsae.cache.errors import RemoteError, TooLongError, UserError

PATIENCE = 300.0  # seconds for which one request is tried again
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 20.0  # seconds between two tries
SILENCE, BETWEEN = 10.0, 60.0  # seconds of trying again before that is logged, and from one such line to the next
TRIES = 4  # times that what fails its checksum is fetched
LASTING = {errno.EINVAL, errno.ENOSYS, errno.EREMCHG}  # what s3fs makes of bad requests and redirects
LASTING_NAMES = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "ParamValidationError",
    "InvalidURL",
    "ClientConnectorCertificateError",
    "ClientConnectorSSLError",
}
TRANSIENT_STATUSES = {408, 425, 429}  # below 500, of a web server
CLIENTS = {"botocore", "aiobotocore", "aiohttp", "s3fs"}
LOG = logging.getLogger("hsae")
ResultT = TypeVar("ResultT")


def redact(text: str) -> str:
    """A text without the passwords and the query strings of the URLs in it."""
    return re.sub(r"(://[^\s?]*\?)[^\s'\")]+", r"\1***", re.sub(r"(://[^\s:@]*):\S*@", r"\1:***@", text))


def retry_request(name: str, request: Callable[[], ResultT], describe: Callable[[Exception], str]) -> ResultT:
    """Do it, and again with growing pauses while the error is transient.

    Raises RemoteError, with what `describe` says of the error, when patience ends or the error is lasting. An object
    that is missing is an answer: FileNotFoundError.
    """
    began, pause = time.monotonic(), FIRST_PAUSE
    while True:
        try:
            return request()
        except (FileNotFoundError, NotADirectoryError, UserError):
            raise
        except TooLongError as error:
            raise TooLongError(f"{name} is refused ({error})") from None
        except Exception as error:
            detail = describe(error)
            if not is_transient(error):
                raise RemoteError(f"{name} is refused ({detail})") from None
            waited = time.monotonic() - began
            if waited + pause > PATIENCE:
                raise RemoteError(f"{name} can't be reached, tried for {PATIENCE:.0f} s ({detail})") from None
            if waited > SILENCE:
                log_waiting(f"{name} can't be reached ({detail}); trying again for up to {PATIENCE:.0f} s")
        time.sleep(pause * random.uniform(0.5, 1))  # many readers must not come back in step
        pause = min(pause * 2, LONGEST_PAUSE)


_logged_at = -BETWEEN


def log_waiting(line: str) -> None:
    """Log it, unless such a line was logged a moment ago: many requests wait together."""
    global _logged_at
    if (now := time.monotonic()) - _logged_at >= BETWEEN:
        _logged_at = now
        LOG.warning(line)


def is_transient(error: Exception) -> bool:
    """Whether trying again later may help."""
    if isinstance(error, PermissionError) or type(error).__name__ in LASTING_NAMES:
        return False
    if isinstance(status := getattr(error, "status", None), int):
        return status >= 500 or status in TRANSIENT_STATUSES
    if isinstance(error, OSError):
        return error.errno not in LASTING
    return isinstance(error, EOFError) or type(error).__module__.split(".")[0] in CLIENTS
