"""Turn any collection of labelled pictures into ``train.lmdb`` and ``val.lmdb``."""
