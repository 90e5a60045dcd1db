"""Rewrites the records of a prepared data set's file."""

from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2 as tf


def rewrite(file, change):
    """Replaces each record of an ArrayRecord file: by what `change` returns for its number and bytes."""
    with ArrayRecordDataSource(str(file)) as source:
        records = source.__getitems__(range(len(source)))
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for number, record in enumerate(records):
        writer.write(change(number, record))
    writer.close()


def turned(number, record):
    """Returns the same features in an order that the number gives, as another process of TFDS may write them."""
    features = tf.Example.FromString(record).features.feature
    names = sorted(features, reverse=number % 2 == 0)
    body = b""
    for name in names:
        one = tf.Example()
        one.features.feature[name].CopyFrom(features[name])
        body += one.features.SerializeToString()
    # what Example's only field holds, and before it its tag and its length as a varint
    size, length = len(body), b""
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return b"\x0a" + length + bytes([size]) + body


def shout(which):
    """Returns the change of one record's caption to upper case: of the same size."""

    def change(number, record):
        if number != which:
            return record
        example = tf.Example.FromString(record)
        (caption,) = example.features.feature["caption"].bytes_list.value
        example.features.feature["caption"].bytes_list.value[:] = [caption.upper()]
        return example.SerializeToString()

    return change
