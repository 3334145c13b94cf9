"""Preprocessing: convert a collection of labelled images to ``train.lmdb`` and ``val.lmdb``.

The way of an image: ``inputs`` and ``layouts`` list files with their classes (from ``sources``, ``remote``, ``devkit``);
``plan`` decides splits, order and codec; ``pool`` and its ``worker`` processes, which speak ``messages``, make records;
``build`` writes one split (``centered`` converts it); ``run`` makes both splits.
"""
