"""The golden hashes, by which a node proves that it makes the same bytes as every other node.

The built-in hash belongs to the code. It covers small built-in images through every codec, view and dtype, and an order;
it takes a few milliseconds. It also covers what a given dataset does not use: a raw dataset says nothing about the decoder
of JPEGs. The hash of a dataset covers sixteen of its samples; the manifest holds the reference.
"""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Final

import numpy as np
import numpy.typing as npt
import simplejpeg
import xxhash

from loader_service.data import kernel
from loader_service.data.augment import augment_records, complete_view
from loader_service.data.codecs import (
    CODECS,
    HEADER,
    Codec,
    Pixels,
    centre_of,
    decode,
    decode_centred,
    encode_centred,
    raw_value,
)
from loader_service.data.draws import draw
from loader_service.data.fill import empty_slice, fill, slice_sources
from loader_service.data.manifest import Statistics
from loader_service.data.order import records_at
from loader_service.data.records import Records
from loader_service.types import VIEWS, Dtype, Installation, SampleLayout, Slice, SliceId, View

SAMPLES: Final = 16
_SEED, _EPOCH = 2012, 60  # any numbers, but every stored hash depends on them
_DATASET_VIEWS = ("train", "center")  # one shuffled with all draws, one sequential

SIDE_PX: Final = 40
PICTURES: Final = 3
_UPPER_HALF: Final = (0, 0, SIDE_PX // 2, SIDE_PX)
"""Window of an image that is decoded a second time, in part where the kernel can, so that the hash covers both decoders."""

_MANY: Final = 65_537
"""One more record than an order's table may have. Cycle walking in 2**17 is then longest, about two steps a position."""

_DTYPES: Final[tuple[Dtype, ...]] = ("uint8", "float16", "float32")

_JPEG_BYTES: Final = (901, 953, 995)
_JPEGS: Final = (
    "c-s4a<NpH&0WUXCHwH#V1_nkTWcYuZ!I^=VlZ%^+gO{6&n~#r|Usyp@SV%}%T}Dn^K~K}rKu=Rw$Jolt&e+V&Tu0X-+|kX)FDN+3$Sx`|Dj>ltFv"
    "uTd2qPaKpRk~?ny9Fnzp1XNKgr<#0R}-11`P%cW=16jCP7AKLB{__803NOWMu>c1}I=;VrF4wW9I-m8mM5a00R>vGcywlGb<|#3sANeD9^wm$SS0"
    "0=*T7<n8>bFC}Pw&aUqAY)5e3MK^H%$7$+4qadL@?OGrwos;O&eYMGdtnOj&|IlH*JxqEne1&4%&g-1k2C8wmOrDtSj6_=Ejl~+_&HMg|3wRd!OO"
    "`1Gq>a^)IX3ko)c*)Xb%U7&iwQ2K~t=qQm*tzS_;Uh<n9Y1mM)TPT;u3o!-<L0f0j~+jH`t13Om#;p4`uyeVx9>lG{sQ@nk%5^J2C(`|5a=%^78Y"
    "g}c96dqnaV*51X)-W4cUYo1KAS`g_VpNIYgW$F5GyKQ`tD^gJ@FGMJ_QFlZUDwL0$v<j5v=qk>xYE#}NLy#lXYN2#h>tK?Zw<X}69q7hRp7{5D*1"
    "Tf}u;|H`HweUXoqtE*f-u1H)OcvDe`<B`nQh0nPRc8K~_FIX@sTkCZYvxVuykR#_7Z@TjR!%eTKGuLK)&?~wUu2{PA>(3Qy6&sKE7RxQk2yEKgcP"
    "sPP=g9K%gNz5CE!ey776;qT*SFv8xn`1a<%rkm#DK$xT53+0&+3n#wei{R%7~T~`zmj%FJBt7ZHrC;Ypol%c8};SOT)?@jrB%r3XJD$^IWtmTUXy"
    "gCFNq=?5SLJuhY+moXPeJchmj)P^BTOr*KQ}&J~Mx6#WwD37z;QvNiLN+{=~eDJjZ*+DkTEuBzD*7#s2H(o+9BcJ4E;Ons8GB=Gk7q>M#fKTd6Zt"
    "{J=e&f!E&uerDE|KI#SR5GFBXeJy6nef#lm5$<TvsE7OX`fmjdvZ>MkM``HLD>ryPma7UH6iA~^?A2vZ?c=u-`;Dwa%%A^xw<UvebeHeN^dSVUOB"
    "5Keb(8X`?=>xJ(x0Q?!?nAhgTKuHq6^9x8F47e9bwJxa?a867pADshdna!Q`oVTG+K#*TyPvlTFsmrk*u@>puNn$D0^?zx3ex{?i}U745d&X|2@$"
    "Ud`sqYJ;e07EJq&^E<jmd@$z8*V<(I*5uHQI~r@BceI+Hs(CVd_HM&>?@k+X6=iWO(kr?%>(d8`x`@SZHtuNkW1G8lvZYL6^f#+~|7m-*zJ_whD+"
    "cAQd3Sb4u5xS9-&&3Jlh*f4S$6l_s)$HGbN87CIg=+}+oqG_J;CGAzFkv7l*_VbCdoWM)i>?1|AWG)`6}G4$7-{meYQzAndNRL*1S@sOT7G4!;_2"
    "gR(F=X>)*Jrtwmw-P|CQ1qZxM?WZXNm9%!62{T#HSYD+<9UV2P?>p5PZWX(5a#|-<9`JP*R{n@%#7V5eOPn@0~pfZ6k`})G^GrcnNLiJ6SuVbw$*"
    ")Y*v)h8yYWP17C%Juz=+luadi8fr9->JeJcTb)rRdY(`q~Mbl>*J<Lx;$Fj)x-I4+xe`wt;)xaq_IuiHs^d#PuR5{vE@^3T%M)+7hN*sj^mT(n)d"
    "wml@*J&3Tbd!+RXZ@dC8{7&+J(5+R2s@GT}i@T~|J=PD(XjxIKMY$<ORr+w=^gWL}!(-j2{>h;EFNQ#Qy?&Il^H@p*^B`K<3RFWctC8Qj>kLB~;P"
    "+myw=vGa6ZdF2N$+;sU@VVs+`Y(kH(tH*=5BiGMgKWZs^#bDEH?U>kBmTBv)O7p6J<S==?dHP1jTfk%e#pkBJ^2(Z)yEiY{xQT(uUG%|Y!=;DB_4"
    "afNy^Z?$>+0>QdE3NUp1eD=`}ETuxyp6s>gFl6qC6&<YyHapGX%f>9KNvi08n?O*YW>10pEaag#"
)
"""The images as JPEGs of quality 60 with chroma at 4:2:0, 4:2:2 and 4:4:4: concatenated, deflated, in base 85. They are
stored as bytes because encoders may differ between libraries; decoders must not."""


def picture(number: int) -> Pixels:
    """Return a built-in image: (SIDE_PX, SIDE_PX, 3) uint8, smooth, without symmetry, from black to nearly white."""
    y, x, channel = np.ogrid[:SIDE_PX, :SIDE_PX, :3]
    wave = (9 * y + 5 * x + 110 * channel + 90 * number + x * y // 8) % 510
    pixels: Pixels = np.minimum(wave, 510 - wave).astype(np.uint8)  # a triangle wave, 0 .. 255
    return pixels


def jpegs() -> list[bytes]:
    """Return the built-in images as JPEG files."""
    whole = zlib.decompress(base64.b85decode(_JPEGS))
    ends = np.cumsum(_JPEG_BYTES).tolist()
    return [whole[end - size : end] for end, size in zip(ends, _JPEG_BYTES, strict=True)]


def installation() -> Installation:
    """Compute the built-in hash in this process; return it with the libraries and the kernel form that made it.

    A correct installation gives ``types.BUILTIN_GOLDEN``.

    Raises:
        ValueError: a built-in JPEG cannot be decoded.
    """
    digest = xxhash.xxh3_128()
    statistics = _statistics()
    # (2, side, side, 3): the mean image and its mirror image, as Records.mean_pair
    mean = np.ascontiguousarray(np.stack((statistics.mean_image, statistics.mean_image[:, ::-1])))
    # The order of these loops is part of the hash.
    for codec in CODECS:
        values = _values(codec, statistics)
        for name in VIEWS:
            view = complete_view(View.named(name, SIDE_PX), statistics)
            for dtype in _DTYPES:
                _add(digest, _made(values, view, dtype, mean))
    digest.update(records_at(_MANY, _SEED, _EPOCH, 0, SAMPLES).tobytes())  # the Feistel network; slices use a table
    libraries = {"numpy": np.__version__, "simplejpeg": simplejpeg.__version__, "kernel": kernel.chosen()}
    return Installation(digest.hexdigest(), libraries)


def of_dataset(records: Records) -> str:
    """Compute the hash of sixteen fixed samples of a dataset.

    Raises:
        RecordError: one of their records cannot be read or decoded.
    """
    digest = xxhash.xxh3_128()
    count = min(SAMPLES, len(records))
    for name in _DATASET_VIEWS:
        # Crop by the records' side, so that the hash also works for records smaller than 224.
        complete = complete_view(View.named(name, records.side), records.statistics)
        out = empty_slice(SampleLayout(complete, "uint8"), count)
        fill(out, records, SliceId(complete, _SEED, _EPOCH, 0, count))
        _add(digest, out)
        digest.update(struct.pack("<Q", count))
    return digest.hexdigest()


def _add(digest: xxhash.xxh3_128, out: Slice) -> None:
    # The draws field by field: their padding bytes are no part of the hash.
    for array in (out.images, out.labels, *(out.draws[field] for field in ("y", "x", "flip", "shift"))):
        digest.update(array.tobytes())


def _made(values: list[memoryview], view: View, dtype: Dtype, mean: npt.NDArray[np.float32]) -> Slice:
    """Return a slice of the built-in images, made as :func:`fill` does."""
    what = SliceId(view, _SEED, _EPOCH, 0, PICTURES, (0,))  # record 0 is excluded, so the hash covers substitution
    sources = slice_sources(PICTURES, what)
    out = empty_slice(SampleLayout(view, dtype), PICTURES)
    out.draws[...] = draw(view, what.seed, what.epoch, what.start, what.count, SIDE_PX)
    chosen = [values[number] for number in sources.tolist()]
    window = mean if dtype != "uint8" else None
    augment_records(out.images, chosen, out.draws, out.labels, sources, None, window, record_side=SIDE_PX)
    return out


def _values(codec: Codec, statistics: Statistics) -> list[memoryview]:
    """Return the built-in images as raw records, header and payload, after a round trip through a codec."""
    centre = centre_of(statistics.mean_image)
    values = []
    for number, jpeg in enumerate(jpegs()):
        value = raw_value(SIDE_PX)
        HEADER.pack_into(value.data, 0, number, CODECS["raw"], 0)  # no checksum: augment_records does not read it
        into = value[HEADER.size :]
        if codec == "jpeg":
            decode(jpeg, CODECS[codec], into, side=SIDE_PX)
            # Overwrites the upper half, by the window decoder if there is one: it must give the same bytes.
            decode(jpeg, CODECS[codec], into, side=SIDE_PX, window=_UPPER_HALF)
        elif codec == "centered":
            decode_centred(encode_centred(picture(number), centre), centre, into)
        else:
            into[:] = picture(number).ravel()
        values.append(value.data)
    return values


def _statistics() -> Statistics:
    """Return statistics with a mean image whose windows all differ, and the colours of ImageNet."""
    y, x, channel = np.ogrid[:SIDE_PX, :SIDE_PX, :3]
    values = np.array([0.2281, 0.0212, 0.0060])
    vectors = np.array([[0.5675, 0.7192, 0.4009], [0.5808, -0.0045, -0.8140], [0.5836, -0.6948, 0.4203]])
    return Statistics(
        mean_image=(100 + y / 8 + x / 16 + channel).astype(np.float32),  # sixteenths: exact in binary
        channel_means=np.full(3, 127.5),
        covariance=np.diag(values),
        eigenvalues=values,
        eigenvectors=vectors,
    )
