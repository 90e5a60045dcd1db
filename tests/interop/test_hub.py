"""Models of the Hugging Face Hub: what is downloaded, and what is said without a network."""

from folder_files import VAE_FILE, fails

from lcm_jax.interop import hub, weights


def test_hub_id_without_network():
    fails(
        "someone/no-such-model",
        "someone/no-such-model, and no model someone/no-such-model could be downloaded from the hub: ",
    )


def test_hub_that_is_not_reached_is_one_sentence(monkeypatch):
    def download(*_, **__):
        raise OSError("Got: ConnectError: no such host\nAn error happened while trying to locate the files.")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    fails("someone/no-such-model", "could be downloaded from the hub: ConnectError: no such host$")


def test_hub_never_fetches_pickles(monkeypatch, copy):
    asked = []

    def download(name, allow_patterns, ignore_patterns=None):
        asked.append((name, allow_patterns, ignore_patterns))
        return str(copy)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert hub.local_folder("someone/model") == copy
    ((name, allowed, _),) = asked
    assert name == "someone/model"
    assert not any(pickle in pattern for pattern in allowed for pickle in weights.PICKLES)
    assert "*" not in allowed

    assert {"*.fp16.*", "*.bf16.*", "*.fp32-*"} <= set(asked[0][2])
    (copy / VAE_FILE).unlink()  # a model with a part in half precision only is asked for again
    hub.local_folder("someone/model")
    assert [ignored for *_, ignored in asked[1:]] == [asked[0][2], None]
