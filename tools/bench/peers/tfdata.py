"""tf.data service over TFRecord files: ``python -m tools.bench.peers.tfdata raw|jpeg RECORDS WORKERS``.

The dispatcher runs in this process, worker servers in processes of their own; records are sharded dynamically and whole
batches come back, as the service's documentation advises.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"

import tensorflow as tf  # after the variables above, which it reads on import

from tools.bench.turns import BATCH, SHAPE, serve

FILES = 16
RECORD_SHAPE = (256, 256, 3)


def written(form: str, folder: Path) -> list[str]:
    """Return the records as TFRecord files; write them if they do not exist."""
    target = folder / f"tfdata-{form}"
    if not target.exists():
        partial = target.with_suffix(".partial")
        partial.mkdir(exist_ok=True)
        paths = sorted((folder / "files").glob("*.jpg"))
        for part in range(FILES):
            with tf.io.TFRecordWriter(str(partial / f"{part:02}.tfrecord")) as writer:
                for path in paths[part::FILES]:  # files of equal length, to within one record
                    content = path.read_bytes()
                    writer.write(content if form == "jpeg" else tf.io.decode_jpeg(content).numpy().tobytes())
        partial.rename(target)  # under its name only when complete
    return sorted(str(path) for path in target.iterdir())


def sample(form: str, content: Any) -> Any:
    """Return a randomly flipped crop, (224, 224, 3) uint8, of one record's content."""
    # 33 is excluded: 0 to 256 - 224.
    y, x = tf.random.uniform((), 0, 33, tf.int32), tf.random.uniform((), 0, 33, tf.int32)
    if form == "jpeg":
        crop = tf.io.decode_and_crop_jpeg(content, tf.stack([y, x, *SHAPE[:2]]), channels=3)
    else:
        whole = tf.reshape(tf.io.decode_raw(content, tf.uint8), RECORD_SHAPE)
        crop = tf.slice(whole, tf.stack([y, x, 0]), SHAPE)
    return tf.ensure_shape(tf.image.random_flip_left_right(crop), SHAPE)


def batches(form: str, folder: Path, workers: int) -> Iterator[Any]:
    """Yield batches endlessly: (128, 224, 224, 3) uint8."""
    files = written(form, folder)
    service = tf.data.experimental.service
    dispatcher = service.DispatchServer()
    # The target is grpc://HOST:PORT, of which a worker wants HOST:PORT.
    command = [sys.executable, "-m", "tools.bench.peers.tfdata", "worker", dispatcher.target.split("://")[1]]
    started = [subprocess.Popen(command) for _ in range(workers)]
    dataset = tf.data.Dataset.from_tensor_slices(files).shuffle(FILES).repeat()
    dataset = dataset.interleave(tf.data.TFRecordDataset, cycle_length=4, num_parallel_calls=tf.data.AUTOTUNE)
    # Shuffled before map(): the buffer holds records, not crops.
    dataset = dataset.shuffle(1024).map(lambda content: sample(form, content), num_parallel_calls=tf.data.AUTOTUNE)
    dataset = dataset.batch(BATCH, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
    # Everything above runs in the worker servers, everything after in this process.
    dataset = dataset.apply(service.distribute(service.ShardingPolicy.DYNAMIC, dispatcher.target))
    try:
        yield from dataset.prefetch(tf.data.AUTOTUNE).as_numpy_iterator()
    finally:
        for worker in started:
            worker.kill()  # work() never ends by itself


def work(dispatcher: str) -> None:
    """Run a worker server until it is killed."""
    config = tf.data.experimental.service.WorkerConfig(dispatcher_address=dispatcher)
    tf.data.experimental.service.WorkerServer(config).join()


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        work(sys.argv[2])
    else:
        serve(batches(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
