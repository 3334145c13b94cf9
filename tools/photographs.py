"""The photographs of the sample images: the package that ships each, its origin and its licence.

Origins and licences are as the packages state them: scikit-image in the docstrings of ``skimage.data``, scikit-learn
in ``sklearn/datasets/images/README.txt``. Every file is checked against its SHA-256 before use.

This module imports the standard library alone: the container's build runs it before anything is installed.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

SKIMAGE: Final = "scikit-image==0.26.0"
SKLEARN: Final = "scikit-learn==1.9.1"


class Photograph(NamedTuple):
    """One class of the sample images.

    Fields:
        label: name of the class.
        package: requirement whose wheel ships the files.
        files: path in the wheel and SHA-256 of each image of this class.
        validation: side of the image that validation views are cut from; training views come from the rest.
        origin: subject and source.
        licence: terms of use.
    """

    label: str
    package: str
    files: dict[str, str]
    validation: Literal["right", "bottom"]
    origin: str
    licence: str


PUBLIC_DOMAIN: Final = "public domain (no known copyright restrictions)"
CC0: Final = "CC0 1.0"
CC_BY: Final = "CC BY 2.0, https://creativecommons.org/licenses/by/2.0/ (changed: cut into views)"
PACKAGE_LICENCE: Final = "no statement of its own; scikit-image is BSD-3-Clause"

PHOTOGRAPHS: Final = (
    Photograph(
        "astronaut",
        SKIMAGE,
        {"skimage/data/astronaut.png": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5"},
        "bottom",
        "Eileen Collins; NASA Great Images database, https://flic.kr/p/r9qvLn",
        PUBLIC_DOMAIN,
    ),
    Photograph(
        "brick",
        SKIMAGE,
        {"skimage/data/brick.png": "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf"},
        "right",
        "a brick wall; CC0Textures, https://cc0textures.com/view.php?tex=Bricks25",
        CC0,
    ),
    Photograph(
        "camera",
        SKIMAGE,
        {"skimage/data/camera.png": "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a"},
        "right",
        "a man with a camera; by Lav Varshney",
        CC0,
    ),
    Photograph(
        "cat",
        SKIMAGE,
        {"skimage/data/chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb"},
        "right",
        "Chelsea the cat; by Stefan van der Walt",
        CC0,
    ),
    Photograph(
        "coffee",
        SKIMAGE,
        {"skimage/data/coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7"},
        "right",
        "a cup of coffee, courtesy of Pikolo Espresso Bar; by Rachel Michetti",
        CC0,
    ),
    Photograph(
        "coins",
        SKIMAGE,
        {"skimage/data/coins.png": "f8d773fc9cfa6f4d8e5942dc34d0a0788fcaed2a4fefbbed0aef5398d7ef4cba"},
        "right",
        "Greek coins from Pompeii; Brooklyn Museum, https://www.brooklynmuseum.org/opencollection/archives/image/51611",
        PUBLIC_DOMAIN,
    ),
    Photograph(
        "flower",
        SKLEARN,
        {"sklearn/datasets/images/flower.jpg": "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638"},
        "bottom",
        "a dahlia; https://www.flickr.com/photos/vultilion/6056698931/ "
        "(scikit-learn's README attributes it to danielbuechele, and links to vultilion)",
        CC_BY,
    ),
    Photograph(
        "galaxies",
        SKIMAGE,
        {"skimage/data/hubble_deep_field.jpg": "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4"},
        "right",
        "Hubble eXtreme Deep Field; NASA, http://hubblesite.org/newscenter/archive/releases/2012/37/image/a/",
        PUBLIC_DOMAIN,
    ),
    Photograph(
        "grass",
        SKIMAGE,
        {"skimage/data/grass.png": "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89"},
        "right",
        "grass; by linolafett, https://www.deviantart.com/linolafett/art/Grass-01-434853879",
        CC0,
    ),
    Photograph(
        "gravel",
        SKIMAGE,
        {"skimage/data/gravel.png": "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12"},
        "right",
        "gravel; CC0Textures, https://cc0textures.com/view.php?tex=Gravel04",
        CC0,
    ),
    Photograph(
        "moon",
        SKIMAGE,
        {"skimage/data/moon.png": "78739619d11f7eb9c165bb5d2efd4772cee557812ec847532dbb1d92ef71f577"},
        "bottom",
        "the surface of the moon",
        PACKAGE_LICENCE,
    ),
    Photograph(
        "motorcycle",
        SKIMAGE,
        {
            "skimage/data/motorcycle_left.png": "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179",
            "skimage/data/motorcycle_right.png": "5fc913ae870e42a4b662314bc904d1786bcad8e2f0b9b67dba5a229406357797",
        },
        "bottom",  # a rectified stereo pair: only a split by rows keeps an object out of both sides
        "a stereo pair of the Middlebury 2014 benchmark (Scharstein and others, GCPR 2014), "
        "http://vision.middlebury.edu/stereo/data/scenes2014/",
        PACKAGE_LICENCE,
    ),
    Photograph(
        "pagoda",
        SKLEARN,
        {"sklearn/datasets/images/china.jpg": "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29"},
        "right",
        "a pagoda in China; by danielbuechele, https://www.flickr.com/photos/danielbuechele/6061409035/",
        CC_BY,
    ),
    Photograph(
        "retina",
        SKIMAGE,
        {"skimage/data/retina.jpg": "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6"},
        "right",
        "a human retina; by Mikael Häggström, "
        "https://commons.wikimedia.org/wiki/File:Fundus_photograph_of_normal_left_eye.jpg",
        CC0,
    ),
    Photograph(
        "rocket",
        SKIMAGE,
        {"skimage/data/rocket.jpg": "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c"},
        "right",
        "Falcon 9 with DSCOVR; SpaceX, https://www.flickr.com/photos/spacexphotos/16511594820/",
        PUBLIC_DOMAIN,
    ),
    Photograph(
        "tissue",
        SKIMAGE,
        {"skimage/data/ihc.png": "f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef"},
        "right",
        "colonic glands, stained for FHL2; Center for Microscopy And Molecular Imaging (CMMI)",
        PUBLIC_DOMAIN,
    ),
)
"""Sorted by class name, which is also the order of the labels."""
