"""Seeds for requests without one."""

import hashlib


class Seeds:
    """Makes distinct seeds; every run makes the same ones."""

    def __init__(self, seed: int) -> None:
        """Each seed depends on `seed` and on the number of earlier seeds."""
        self._seed = seed
        self._num_made = 0

    def draw(self) -> int:
        """Returns the next seed, of 64 bits."""
        self._num_made += 1
        text = f"{self._seed}/{self._num_made}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
