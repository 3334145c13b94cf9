"""Any pile of labelled pictures -> ``train.lmdb`` and ``val.lmdb``; run as ``python -m tools.preprocess SRC OUT``."""
