"""
Run in the environment of the `tensorflow` extra: makes Keras files, and Keras' own answers to some.

python keras_nets.py FOLDER PICTURES.npz: "samples" uint8 (N, H, W, 1) and "labels" of the latter
train the nets a little.
"""

import json
import os
import sys
import zipfile
from pathlib import Path

os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
sys.path[:] = [place for place in sys.path if place != str(Path(__file__).parent)]

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
from keras import layers  # noqa: E402

OWN = """
import keras

class Twice(keras.layers.Layer):
    def call(self, x):
        return 2.0 * x
"""


def unit(x, width, stride):
    x = layers.Conv2D(width, 3, strides=stride, padding="same", use_bias=False)(x)
    return layers.ReLU()(layers.BatchNormalization()(x))


def head(x):
    return layers.Dense(10)(layers.GlobalAveragePooling2D()(x))


def three_exits(size=28):
    """The input and three exits, the deepest one called first."""
    feed = keras.Input((size, size, 1), name="picture")
    a = unit(feed, 8, 2)
    b = unit(a, 16, 2)
    c = unit(b, 24, 2)
    return feed, {"final": head(c), "early": head(a), "mid": head(b)}


@keras.saving.register_keras_serializable(package="tests")
class Subclassed(keras.Model):
    def __init__(self, **options):
        super().__init__(**options)
        self.flat, self.body = layers.Flatten(), layers.Dense(16, "relu")
        self.heads = [layers.Dense(10), layers.Dense(10)]
        self.more = layers.Dense(16, "relu")

    def call(self, x):
        x = self.body(self.flat(x))
        return [self.heads[0](x), self.heads[1](self.more(x))]


def main(folder: Path, pictures: Path) -> None:
    keras.utils.set_random_seed(0)
    some = np.load(pictures)
    x = ((some["samples"] / 255 - 0.286) / 0.353).astype("float32")
    y = some["labels"].astype("int64")
    answers = {}

    def save(name, model):
        model.save(folder / f"{name}.keras")
        found = model.predict(x[:60], batch_size=1, verbose=0)
        found = found if isinstance(found, dict) else dict(enumerate(found))
        answers.update({f"{name}/{exit}": values for exit, values in found.items()})

    feed, exits = three_exits()
    net = keras.Model(feed, exits)
    crossed = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    net.compile("adam", loss=dict.fromkeys(exits, crossed))
    net.fit(x, dict.fromkeys(exits, y), epochs=8, batch_size=32, verbose=0)
    save("net", net)
    net.export(folder / "saved", verbose=False)

    ends = [layers.Softmax(name=f"soft_{name}")(exits[name]) for name in exits]
    save("soft", keras.Model(feed, ends))

    body = Subclassed()
    body(x[:1])
    save("subclassed", body)

    # What is refused.
    feed, exits = three_exits()
    twice = layers.Lambda(lambda v: 2.0 * v)(exits["final"])
    keras.Model(feed, [exits["early"], twice]).save(folder / "lambda.keras")
    keras.Model(*three_exits(size=None)).save(folder / "sizes.keras")
    other = keras.Input((10,), name="other")
    keras.Model([feed, other], [exits["early"], exits["final"] + other]).save(folder / "two.keras")
    products = keras.ops.cumprod(exits["final"], axis=-1)
    keras.Model(feed, [exits["early"], products]).save(folder / "operator.keras")

    class Reads(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((1, 28, 28, 1), tf.float32)])
        def __call__(self, v):
            tf.io.write_file(str(folder / "written"), "x")
            return {"out": tf.reduce_mean(v, (2, 3))}

    tf.saved_model.save(Reads(), str(folder / "writes"))
    (folder / "own.py").write_text(OWN)
    sys.path.insert(0, str(folder))
    import own

    twice = own.Twice()(exits["final"])
    keras.Model(feed, {"early": exits["early"], "final": twice}).save(folder / "own.keras")
    forge(folder / "net.keras", folder / "forged.keras", ["touch", str(folder / "written")])
    np.savez(folder / "answers.npz", **answers)


def forge(source: Path, out: Path, command: list[str]) -> None:
    """*source* with a layer that is no layer, but runs *command* when it is made."""
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(out, "w") as forged:
        for name in archive.namelist():
            data = archive.read(name)
            if name == "config.json":
                document = json.loads(data)
                layer = document["config"]["layers"][1]
                layer |= {"module": "subprocess", "class_name": "Popen", "registered_name": None}
                layer["config"] = {"args": command}
                data = json.dumps(document).encode()
            forged.writestr(name, data)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
