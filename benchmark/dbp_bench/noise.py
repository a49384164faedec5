"""Every random number of this package is drawn here: addressable, replayable, batch-independent.

A draw is a pure function of its address (seed, owner, image id, draw, site, step). Asking for an
address twice gives the same numbers, so a draw can be replayed by gradient checkpointing, by
scoring, or by an attacker who has been shown it, at any batch size, order, device or worker.

The bits come from Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
3"), the generator of ``numpy.random.Philox``. Normals come from the Box-Muller transform, written
with operations that IEEE 754 rounds exactly (+, -, *, /, sqrt) and no library logarithm or cosine,
whose last bits differ between devices and even between positions in a vectorised batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from math import factorial, log, pi, prod
from types import ModuleType
from typing import Any, NewType, NoReturn, Protocol, final

import numpy as np
import torch
from torch import Tensor

from dbp_bench.errors import NotConforming

Site = NewType("Site", str)
"""A named place where a defense draws noise."""

FORWARD = Site("forward")
REVERSE = Site("reverse")
GUIDANCE = Site("guidance")

VICTIM = "victim"
ATTACKER = "attacker"


class Noise(Protocol):
    """The only source of randomness a defense may use."""

    def normal(self, site: Site, step: int, like: Tensor) -> Tensor:
        """Standard normal noise, shaped, typed and placed like `like` ``(b, ...)``."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Tape:
    """A replayable source of draws for a batch, one row per (image, draw).

    Args:
        seed: Seed of the run.
        owner: The party that draws. Different owners never share a number.
        ids: Image ids, int64 ``(b,)``.
        draws: The number of the realisation that each row uses, int64 ``(b,)``.
    """

    seed: int
    owner: str
    ids: Tensor
    draws: Tensor

    @classmethod
    def make(cls, seed: int, owner: str, ids: Sequence[int] | Tensor, draw: int = 0) -> "Tape":
        """A tape in which every image of `ids` uses realisation number `draw`."""
        rows = torch.as_tensor(ids, dtype=torch.int64)
        return cls(seed, owner, rows, torch.full_like(rows, draw))

    def copies(self, draws: Sequence[int]) -> "Tape":
        """The tape with image ``i`` and realisation ``draws[j]`` in row ``i * len(draws) + j``."""
        numbers = torch.as_tensor(draws, dtype=torch.int64)
        return Tape(
            self.seed,
            self.owner,
            self.ids.repeat_interleave(len(numbers)),
            numbers.repeat(len(self.ids)),
        )

    def repeat(self, copies: int) -> "Tape":
        """Each row `copies` times in a row, with the same draw."""
        return self[torch.arange(len(self.ids)).repeat_interleave(copies)]

    def __getitem__(self, rows: Tensor) -> "Tape":
        """The tape of some of the rows (an index or a mask)."""
        return Tape(self.seed, self.owner, self.ids[rows], self.draws[rows])

    def normal(self, site: Site, step: int, like: Tensor) -> Tensor:
        """Standard normal noise, shaped, typed and placed like `like` ``(b, ...)``."""
        return self._rows(site, step, like, _normals, per_word=2)

    def uniform(self, site: Site, step: int, like: Tensor) -> Tensor:
        """Uniform noise in (0, 1), shaped, typed and placed like `like` ``(b, ...)``."""
        return self._rows(site, step, like, _uniforms, per_word=1)

    def kept(self, site: Site, step: int, like: Tensor, probability: float) -> Tensor:
        """1 with this probability (in steps of 2^-16), else 0; shaped and typed like `like`."""
        least = round((1 - probability) * 65536)

        def transform(words: Any, xp: ModuleType) -> Any:
            return _quarters(words, xp) >= least

        return self._rows(site, step, like, transform, per_word=4)

    def _rows(
        self,
        site: Site,
        step: int,
        like: Tensor,
        transform: Callable[[Any, ModuleType], Any],
        per_word: int,
    ) -> Tensor:
        """One row of numbers for each row of the tape, a cache-sized chunk of rows at a time."""
        if len(like) != len(self.ids):
            raise ValueError(f"the tape has {len(self.ids)} rows, but the batch has {len(like)}.")
        size = prod(like.shape[1:])
        blocks = -(-size // (4 * per_word))
        key = _key(self.seed, self.owner, site)
        near = like.device.type == "cpu" or like.numel() <= SMALL
        place = torch.device("cpu") if near else like.device
        out = torch.empty(len(self.ids), size, dtype=like.dtype, device=place)
        rows = max(1, _CHUNK // blocks) if near else len(self.ids)
        for start in range(0, len(self.ids), rows):
            ids, draws = self.ids[start : start + rows], self.draws[start : start + rows]
            xp, integers = _library(place)
            block = integers(torch.arange(blocks))
            counter = (block, integers(torch.tensor([step])), integers(draws[:, None]))
            words = xp.stack(philox((*counter, integers(ids[:, None])), key, xp), 2)
            words = words.reshape(len(ids), -1)
            values = transform(words, xp)[:, :size]
            out[start : start + rows] = torch.as_tensor(values)
        return out.to(like.device).view(like.shape)


class CachedTape:
    """A tape that keeps the draws it has made, since an attack asks for known draws at every step.

    Its draws are the tape's own, bit for bit. Draws that do not fit into :data:`CACHE_BYTES` are
    made anew each time.

    Args:
        tape: The tape whose draws are kept.
        rows: Rows of the tape that are asked for, int64 ``(b,)``; all of them where not given.
    """

    def __init__(self, tape: Tape, rows: Tensor | None = None) -> None:
        self._tape = tape
        self._rows = torch.arange(len(tape.ids)) if rows is None else rows
        self._held: dict[tuple[Any, ...], Tensor] = {}

    @property
    def ids(self) -> Tensor:
        """Image ids, int64 ``(b,)``."""
        return self._tape.ids[self._rows]

    def repeat(self, copies: int) -> "CachedTape":
        """Each row `copies` times in a row, with the same draw; shares the cache."""
        return self[torch.arange(len(self._rows)).repeat_interleave(copies)]

    def __getitem__(self, rows: Tensor) -> "CachedTape":
        """The tape of some of the rows (an index or a mask); shares the cache."""
        part = CachedTape(self._tape, self._rows[rows])
        part._held = self._held
        return part

    def normal(self, site: Site, step: int, like: Tensor) -> Tensor:
        """Standard normal noise, shaped, typed and placed like `like` ``(b, ...)``."""
        if len(like) != len(self._rows):
            raise ValueError(f"the tape has {len(self._rows)} rows, but the batch has {len(like)}.")
        key = (site, step, like.shape[1:], like.dtype, like.device)
        if key not in self._held:
            whole = like.new_empty(len(self._tape.ids), *like.shape[1:])
            held = sum(value.nbytes for value in self._held.values())
            if held + whole.nbytes > CACHE_BYTES:
                return self._tape[self._rows].normal(site, step, like)
            self._held[key] = self._tape.normal(site, step, whole)
        # A copy: a purifier may change in place what it was given.
        return self._held[key][self._rows.to(like.device)]


CACHE_BYTES = 256 << 20
"""Largest cache of one attack on a group of images."""


class NothingElse(NotConforming, AttributeError):
    """A purifier asked its noise for something else than draws."""


@final
class OpaqueNoise:
    """The noise that a purifier is handed, of one type in an attack and in an evaluation.

    Draws can be made with :meth:`normal`; no seed, owner, id or draw number can be read, and
    nothing tells whose draws they are. Each of several votes has a range of step numbers of its
    own, so that it is drawn, revealed and guessed like any other draw; vote 0 has the numbers of a
    defense that doesn't vote.

    Args:
        source: The source of the draws.
        vote: The number of the vote that they are for.
        sites: The sites at which draws can be made; any if not given. An attacker is shown, or
            guesses, draws at declared sites: elsewhere it would take a hidden draw for a known one.
    """

    __slots__ = ("__draw", "__vote")

    def __init__(self, source: Noise, vote: int = 0, sites: frozenset[Site] | None = None) -> None:
        def draw(site: Site, step: int, like: Tensor) -> Tensor:
            if sites is not None and site not in sites:
                raise NotConforming(
                    f"it draws at [{site}] without declaring so. Declare sites: "
                    f"[{', '.join(sorted({*sites, site}))}]."
                )
            return source.normal(site, vote * STEPS_PER_VOTE + step, like)

        object.__setattr__(self, "_OpaqueNoise__draw", draw)
        object.__setattr__(self, "_OpaqueNoise__vote", vote)

    def normal(self, site: Site, step: int, like: Tensor) -> Tensor:
        """Standard normal noise, shaped, typed and placed like `like` ``(b, ...)``."""
        drawn: Tensor = object.__getattribute__(self, "_OpaqueNoise__draw")(site, step, like)
        return drawn

    def __getattribute__(self, name: str) -> Any:
        if name in ("normal", "__class__"):
            return object.__getattribute__(self, name)
        raise NothingElse(
            f"it asks the noise for {name!r}. Noise gives normal(site, step, like), nothing else."
        )

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise NothingElse(f"it sets {name!r} of the noise. Keep state in a variable of its own.")


STEPS_PER_VOTE = 1 << 32
"""More steps than a purifier has."""


def _library(device: torch.device) -> tuple[ModuleType, Callable[[Tensor], Any]]:
    """The array library for `device`, and the function that makes its arrays of int64 tensors."""
    if device.type == "cpu":
        return np, lambda numbers: numbers.numpy().astype(np.uint64)
    return torch, lambda numbers: numbers.to(device)


def shuffled(items: Sequence[int], seed: int, owner: str) -> list[int]:
    """`items` in an order that depends on nothing but `seed` and `owner`."""
    tape = Tape.make(seed, owner, items)
    ranks = tape.uniform(Site("order"), 0, torch.empty(len(items), 1, dtype=torch.float64))
    order = torch.argsort(ranks[:, 0], stable=True)
    return [items[i] for i in order.tolist()]


# ------------------------------------------------------------------------------- Philox4x64-10
#
# Written once for two array libraries, passed as `xp`: NumPy (uint64) on the CPU, where it is
# several times faster, and torch (int64, bits taken as unsigned) on a device. Both give the same
# bits, so both give the same draws.

SMALL = 1 << 16
"""Numbers of a draw that is made on the CPU and copied, also where it is for a device.

A device takes about five hundred launches for a draw of any size. A CPU takes about 2 ms for this
many numbers, and less for fewer.
"""

_CHUNK = 8192
"""Philox blocks per pass on the CPU: what the second-level cache holds."""

_M0, _M1 = 0xD2E7470EE14C6C93, 0xCA5A826395121157
_W0, _W1 = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
_LOW = 0xFFFFFFFF
_WORD = (1 << 64) - 1


def philox(counter: Sequence[Any], key: tuple[int, int], xp: ModuleType) -> list[Any]:
    """Four words of 64 random bits for each counter (Salmon et al. 2011, section 4.3).

    Args:
        counter: Four arrays, uint64 (NumPy) or int64 (torch), which broadcast: while they differ
            in shape, the first rounds cost less.
        key: Two words, each in [0, 2^64).
        xp: The array library, ``numpy`` or ``torch``.

    Returns:
        Four arrays of that shape, bit-identical to ``numpy.random.Philox`` at that counter and
        key.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _M0, xp)
        high1, low1 = _multiply(c2, _M1, xp)
        high0 ^= _constant(k1, xp)
        high1 ^= _constant(k0, xp)
        c0, c1, c2, c3 = high1 ^ c1, low1, high0 ^ c3, low0
        k0, k1 = (k0 + _W0) & _WORD, (k1 + _W1) & _WORD
    return [c0, c1, c2, c3]


def _multiply(x: Any, constant: int, xp: ModuleType) -> tuple[Any, Any]:
    """High and low word of the unsigned 128-bit product, from 32-bit halves."""
    m_high, m_low = constant >> 32, constant & _LOW
    x_low, x_high = x & _LOW, _upper(x, xp)
    low = _upper(x_low * m_low, xp)
    low += x_high * m_low
    middle = low & _LOW
    x_low *= m_high
    middle += x_low
    x_high *= m_high
    x_high += _upper(low, xp)
    x_high += _upper(middle, xp)
    return x_high, x * _constant(constant, xp)


def _upper(x: Any, xp: ModuleType) -> Any:
    """The upper 32 bits; torch shifts the sign in, which must be masked."""
    upper = x >> 32
    if xp is torch:
        upper &= _LOW
    return upper


def _constant(word: int, xp: ModuleType) -> int:
    return word - (1 << 64) if xp is torch and word >> 63 else word


@lru_cache(maxsize=256)
def _key(seed: int, owner: str, site: str) -> tuple[int, int]:
    digest = blake2b(f"{seed}/{owner}/{site}".encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


# ------------------------------------------------------- exactly rounded distributions, float32

_COS = [(-1) ** n / factorial(2 * n + 2) for n in range(7)]
_SIN = [(-1) ** n / factorial(2 * n + 3) for n in range(6)]
_ARTANH = [1 / n for n in range(1, 11, 2)]
_LN2 = log(2)


def _normals(words: Any, xp: ModuleType) -> Any:
    """Standard normals ``(b, 2 n)`` in float32 from 64-bit words ``(b, n)``.

    Box and Muller (1958). The lower half of a word gives the radius (at most 6.8); of the upper
    half, 31 bits give an angle in (-pi/2, pi/2) and one bit the half turn that is added to it.
    """
    lower, upper = _halves(words, xp)
    radius = _log(_unit(lower, 32, xp), xp)
    radius *= -2.0
    radius = xp.sqrt(radius)
    angle = _unit(upper & 0x7FFFFFFF, 31, xp)
    angle -= 0.5
    angle *= pi
    square = angle * angle
    cosine = _horner(square, _COS)
    cosine *= square
    cosine = 1.0 - cosine
    sine = _horner(square, _SIN)
    square *= angle
    sine *= square
    sine = angle - sine
    # A half turn is a change of sign; bit 31 of a word is the sign bit of a float32.
    signed = radius.view(xp.int32)
    signed ^= _int32(upper & 0x80000000, xp)
    cosine *= radius
    sine *= radius
    return xp.stack([cosine, sine], 2).reshape(len(words), -1)


def _uniforms(words: Any, xp: ModuleType) -> Any:
    """Uniforms ``(b, n)`` in (0, 1), the middles of 2^23 cells, in float32."""
    return _unit((words >> 11) & 0x7FFFFF, 23, xp)


def _log(x: Any, xp: ModuleType) -> Any:
    """Natural logarithm of positive float32, to about 1e-7 relative.

    ``x = m * 2^e`` with m in [sqrt(1/2), sqrt(2)), so that log(m) = 2 artanh((m-1)/(m+1)) keeps its
    relative precision near x = 1.
    """
    bits = x.view(xp.int32)
    exponent = (bits - 0x3F3504F3) >> 23
    mantissa = (bits - (exponent << 23)).view(xp.float32)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    series = _horner(s * s, _ARTANH)
    series *= s
    series *= 2.0
    series += _float(exponent, xp) * _LN2
    return series


def _horner(x: Any, coefficients: Sequence[float]) -> Any:
    total = x * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:
        total += coefficient
        total *= x
    total += coefficients[0]
    return total


def _unit(integers: Any, bits: int, xp: ModuleType) -> Any:
    """The middles of 2^bits equal cells of (0, 1), rounded, for integers in [0, 2^bits)."""
    values = _float(integers, xp)
    values += 0.5
    values *= 2.0**-bits
    return values


def _halves(words: Any, xp: ModuleType) -> tuple[Any, Any]:
    """Lower and upper 32 bits of each word: int64 in torch, uint32 in NumPy."""
    if xp is torch:
        return words & _LOW, _upper(words, xp)
    pairs = words.astype("<u8", copy=False).view("<u4")
    return pairs[:, 0::2], pairs[:, 1::2]


def _quarters(words: Any, xp: ModuleType) -> Any:
    """The four lots of 16 bits of each word ``(b, n)``, lowest first: ``(b, 4 n)``, 0 ... 65535."""
    if xp is torch:
        shifted = [(words >> shift) & 0xFFFF for shift in (0, 16, 32, 48)]
        return torch.stack(shifted, 2).flatten(1)
    return words.astype("<u8", copy=False).view("<u2")


def _int32(bits: Any, xp: ModuleType) -> Any:
    """The answer of :func:`_halves` as int32 with the same bits."""
    return bits.to(torch.int32) if xp is torch else bits.view(np.int32)


def _float(integers: Any, xp: ModuleType) -> Any:
    return integers.to(torch.float32) if xp is torch else integers.astype(np.float32)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generators inside, and restore them after.

    Networks initialise from that of the processor, and attacks of others draw from that of the
    current GPU, too. One that isn't in use, or another GPU, is left alone.
    """
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    gpus = [torch.cuda.current_device()] if in_use else []
    with torch.random.fork_rng(gpus):
        torch.default_generator.manual_seed(seed)
        if gpus:
            torch.cuda.manual_seed(seed)
        yield
