"""Whether the coordinator can be reached, is who it should be, and has the same time."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx

from lepton_fed.errors import Problem, RunError

__all__ = ["Contact", "reach"]

_WAIT_S = 10.0
_AHEAD_S = 5.0  # Flower's node authentication refuses a clock that is further ahead,
_BEHIND_S = 300.0  # or further behind


class Contact:
    """What the coordinator answered.

    Args:
        skew_s: Seconds by which this machine's clock is ahead of the coordinator's.
    """

    def __init__(self, skew_s: float) -> None:
        self.skew_s = skew_s

    def check_clock(self) -> str:
        """Return what is found of the clock.

        Raises:
            RunError: LF5333, it is too far from the coordinator's.
        """
        if not -_BEHIND_S <= self.skew_s <= _AHEAD_S:
            way = "ahead of" if self.skew_s > 0 else "behind"
            raise RunError(
                Problem("LF5333", f"this machine's clock is {abs(self.skew_s):.0f} s {way} the "
                        "coordinator's", remedy="set both by NTP: at most 5 s ahead, 300 s behind")
            )  # fmt: skip
        return f"within {max(1.0, abs(self.skew_s)):.0f} s of the coordinator's"


def reach(
    address: str,
    ca: Path,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    wait_s: float = _WAIT_S,
) -> Contact:
    """Connect to the coordinator as a site does, and ask nothing.

    Args:
        address: Address and port of the coordinator.
        ca: Certificate of the authority that must have signed the coordinator's, PEM.
        now: Tells the time.
        wait_s: Seconds to wait for each step of the connection.

    Raises:
        RunError: LF5331, it cannot be reached; LF5332, it does not show a certificate that the
            authority signed for this host.
    """
    try:
        context = ssl.create_default_context(cafile=str(ca))
    except (OSError, ssl.SSLError) as error:
        raise RunError(
            Problem("LF5332", f"the authority's certificate cannot be used: {error}",
                    where=str(ca), key="ca", remedy="fetch ca.crt from the coordinator again")
        ) from error  # fmt: skip
    try:
        with httpx.Client(verify=context, timeout=wait_s) as client:
            answer = client.get(f"https://{address}/")
        theirs = parsedate_to_datetime(answer.headers["date"])
    except httpx.TransportError as error:
        why = str(error) or type(error).__name__
        if "certificate" in why.lower():  # a line that is cut in the handshake is SSL's error too
            raise RunError(
                Problem("LF5332", f"the coordinator's certificate is refused: {why}",
                        where=address, key="ca",
                        remedy="use a host that the certificate is for, and its authority's ca.crt")
            ) from error  # fmt: skip
        raise RunError(
            Problem("LF5331", f"the coordinator cannot be reached: {why}", where=address,
                    key="coordinator",
                    remedy="see whether it runs, and what lies between: firewall, proxy, name")
        ) from error  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            Problem("LF5331", "what answers there is no coordinator", where=address,
                    key="coordinator", remedy="look at address and port")
        ) from error  # fmt: skip
    return Contact((now() - theirs).total_seconds())
