"""Seeds of requests that bring none."""

import hashlib


class Seeds:
    """Draws seeds that differ from each other, and repeat from run to run."""

    def __init__(self, seed: int) -> None:
        """All of them follow from one number, and from how many were drawn before."""
        self._seed = seed
        self._num_made = 0

    def draw(self) -> int:
        """The next one, of 64 bits."""
        self._num_made += 1
        text = f"{self._seed}/{self._num_made}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
