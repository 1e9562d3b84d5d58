"""The engine of `examples/serve` writes what transformers writes, whoever runs beside whom, and after a SIGKILL too.

Models are tiny and random. Matrix products of another number of rows round differently, so tokens can be compared only
where the likeliest one is likelier by more than rounding: `reference` checks that, from the logits in float32 and in
float64. A restored engine takes the same steps as one that was never stopped, so there nothing rounds differently.
"""

import io
import json
import os
import random
import signal
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch")
transformers = pytest.importorskip("transformers", reason="needs transformers")

import tilefold as tf  # noqa: E402

SERVE = Path(__file__).parents[2] / "examples" / "serve"
sys.path.insert(0, str(SERVE))

import serve  # noqa: E402
import snapshot  # noqa: E402
from engine import Engine  # noqa: E402
from ragged import Ragged  # noqa: E402
from screen import Table  # noqa: E402

transformers.logging.set_verbosity_error()

WORDS, STOP = 260, 259
TINY = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": STOP,
}  # fmt: skip
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 12}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**TINY),
    "mistral": lambda: transformers.MistralConfig(**TINY, sliding_window=12),
    "gemma2": lambda: transformers.Gemma2Config(
        **TINY, **WINDOWS, head_dim=8, query_pre_attn_scalar=8, attn_logit_softcapping=2.0
    ),
}
NEW = 24
ENOUGH = {"pages": 400, "page": 8, "most": 5, "chunk": 16}
SETTINGS = {
    "enough": ENOUGH,
    "alone": {**ENOUGH, "most": 1},
    "odd pages, small chunks": {**ENOUGH, "page": 5, "chunk": 3},
    "one token a page": {**ENOUGH, "pages": 2000, "page": 1, "chunk": 500, "most": 50},
    "few pages": {**ENOUGH, "pages": 44},
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small take longer to share out than to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def made(family="llama"):
    """A model whose weights are large enough that attention is not nearly uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.data.normal_(std=weight.shape[-1] ** -0.5)
    return model


def asked():
    """(system, tokens, new) of a dozen requests: five with one system text, three with another, four with none."""
    rng = np.random.default_rng(0)
    texts = {"": [], "a": rng.integers(3, STOP, 37).tolist(), "b": rng.integers(3, STOP, 16).tolist()}
    rows = []
    for n in range(12):
        system = "aabaa b a b "[n].strip()
        own = rng.integers(3, STOP, int(rng.integers(1, 40))).tolist()
        rows.append((system, texts[system] + own, int(rng.integers(2, NEW))))
    return rows


@lru_cache
def reference(family="llama"):
    """What transformers writes for each request alone; from a stop token on, nothing.

    The token that the first request writes third is made the one to stop at, so that some do.
    """
    model = made(family)
    requests = asked()
    stop = alone(model, *requests[0][1:])[2]
    model.generation_config.eos_token_id = stop
    written = [alone(model, tokens, new) for _, tokens, new in requests]
    wide = made(family).double()
    for (_, tokens, _), more in zip(requests, written, strict=True):
        ids = torch.tensor([tokens + more])
        rows = slice(len(tokens) - 1, -1)
        with torch.inference_mode():
            narrow, exact = (m(ids).logits[0, rows].double() for m in (model, wide))
        best = exact.topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 16 * (narrow - exact).abs().max(), (
            "the likeliest token depends on rounding"
        )
    assert any(len(w) < new for w, (_, _, new) in zip(written, requests, strict=True))
    return stop, written


def alone(model, tokens, new):
    ids = torch.tensor([tokens])
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return whole[0, len(tokens) :].tolist()


def engine_for(settings, family="llama", sharing=True):
    """An engine with all requests in its queue."""
    model = made(family)
    model.generation_config.eos_token_id = reference(family)[0]
    engine = Engine(Ragged(model), **settings)
    serve.submit(engine, asked(), sharing)
    return engine


def finished(engine):
    while engine.busy:
        engine.step()
    return [r.written for r in engine.requests]


# ---- tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_are_those_of_each_request_alone(name, sharing):
    engine = engine_for(SETTINGS[name], sharing=sharing)
    assert finished(engine) == reference()[1]
    assert engine.cache.pages_used == 0 and engine.cache.ids == []
    assert (engine.totals.sent_back > 0) == (name == "few pages")
    assert (engine.totals.most_saved > 0) == (sharing and name != "alone")


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_windows_and_softcaps(family):
    assert finished(engine_for(ENOUGH, family)) == reference(family)[1]


def test_sharing_reads_a_prefix_once():
    shared, apart = engine_for(ENOUGH), engine_for(ENOUGH, sharing=False)
    assert len(shared.prefixes) == 2 and not apart.prefixes
    finished(shared), finished(apart)
    again = sum(
        (sum(r.prefix == n for r in shared.requests) - 1) * len(p.prompt)
        for n, p in enumerate(shared.prefixes)
    )
    assert again > 0 and apart.totals.read - shared.totals.read == again
    assert shared.totals.most_pages < apart.totals.most_pages


def test_rows_that_read_and_rows_that_write_go_together():
    engine = engine_for(ENOUGH)
    kinds, whole = set(), engine.model.next_tokens

    def seen(cache, rows):
        kinds.add((any(len(r.tokens) > 1 for r in rows), sum(len(r.tokens) == 1 for r in rows) > 1))
        assert sum(len(r.tokens) for r in rows if len(r.tokens) > 1) <= ENOUGH["chunk"]
        assert len(rows) <= ENOUGH["most"] + len(engine.prefixes)
        return whole(cache, rows)

    engine.model.next_tokens = seen
    finished(engine)
    assert (True, True) in kinds


def test_the_youngest_gives_way_and_keeps_what_it_wrote():
    engine = engine_for(SETTINGS["few pages"])
    place = {id(r): n for n, r in enumerate(engine.requests)}
    kept = 0
    while engine.busy:
        before, written = engine.totals.sent_back, [len(r.written) for r in engine.requests]
        engine.step()
        assert [place[id(r)] for r in (*engine.running, *engine.waiting)] == sorted(
            place[id(r)] for r in engine.requests if not r.done
        )
        assert all(len(r.written) >= n for r, n in zip(engine.requests, written, strict=True))
        if engine.totals.sent_back > before:
            kept += len(engine.waiting[0].written)
    assert kept


def test_a_prefix_that_nobody_uses_makes_room():
    """It is read for a request that then does not fit, and gives way to the one that runs; later it is read again."""
    engine = Engine(Ragged(made()), **{**ENOUGH, "pages": 30})
    prefix = [9] * 16
    engine.submit(LONG[:8], 100)
    engine.submit(prefix + LONG[:96], 1, engine.share(prefix))
    written = finished(engine)
    assert [len(w) for w in written] == [100, 1]
    assert engine.totals.sent_back == 0
    assert engine.totals.read == (8 + 99) + 2 * 16 + 96


# ---- stopped and continued -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["enough", "few pages"])
def test_a_snapshot_of_any_step_continues_with_the_same_steps(tmp_path, name):
    engine = engine_for(SETTINGS[name])
    ragged, saved = engine.model, []
    while engine.busy:
        engine.step()
        if engine.totals.steps % 5 == 0:
            saved.append(tmp_path / str(engine.totals.steps))
            snapshot.save(saved[-1], engine, 1)
    assert len(saved) > 5
    for folder in saved:
        again = snapshot.load(folder, ragged, 1)
        assert again.totals.steps == int(folder.name)
        assert finished(again) == reference()[1]
        assert (again.totals.steps, again.totals.sent_back) == (engine.totals.steps, engine.totals.sent_back)


@pytest.mark.parametrize("broken", ["dump", "fsync"])
def test_a_crash_between_the_two_files_leaves_the_older_snapshot(tmp_path, monkeypatch, broken):
    engine = engine_for(ENOUGH)
    for _ in range(10):
        engine.step()
    snapshot.save(tmp_path, engine, 1)
    engine.step()

    def crash(*args):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        if broken == "dump":
            patch.setattr(snapshot.json, "dump", crash)
        else:
            whole = os.fsync
            calls = iter([whole, whole, crash])  # the cache file, its folder, then the state
            patch.setattr(os, "fsync", lambda handle: next(calls)(handle))
        with pytest.raises(OSError, match="no space"):
            snapshot.save(tmp_path, engine, 1)
    assert (tmp_path / "step-11.cache").exists()
    again = snapshot.load(tmp_path, engine.model, 1)
    assert again.totals.steps == 10
    assert finished(again) == reference()[1]
    snapshot.save(tmp_path, again, 1)
    assert len(list(tmp_path.glob("*.cache"))) == 1


@pytest.mark.parametrize("at", [1, 2, 9, 40])
def test_a_step_that_fails_changes_nothing(monkeypatch, at):
    """Ctrl-C in some layer of some step, again and again."""
    engine = engine_for(SETTINGS["few pages"])
    whole, calls = tf.attention, 0

    def interrupted(*args, **options):
        nonlocal calls
        calls += 1
        if calls % at == 0:
            calls += 1  # the next attempt is let through
            raise KeyboardInterrupt
        return whole(*args, **options)

    monkeypatch.setattr(tf, "attention", interrupted)
    failures = 0
    while engine.busy:
        before = [r.tokens for r in engine.requests]
        try:
            engine.step()
        except KeyboardInterrupt:
            failures += 1
            assert [r.tokens for r in engine.requests] == before
            for r in (*engine.requests, *engine.prefixes):
                assert not r.ids or set(engine.cache.lengths(r.ids).tolist()) == {r.read}
            if failures > 5:
                monkeypatch.setattr(tf, "attention", whole)
    assert failures
    assert [r.written for r in engine.requests] == reference()[1]


def checkpoint(folder):
    """A model of `made` with a tokenizer of bytes, as `--model` takes them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: 3 + n for n, letter in enumerate(letters)}  # STOP is the number after the last
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    model = made()
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)


def said_by_main(monkeypatch, capsys, *options):
    monkeypatch.setattr(sys, "argv", ["serve.py", *map(str, options)])
    serve.main()
    return capsys.readouterr()


def test_killed_and_restarted_it_writes_the_same_tokens(tmp_path, monkeypatch, capsys):
    """Killed by another process, wherever it is then: maybe within a step, maybe while it saves.

    It cannot have come to its end before: the pipe holds a page, less than what is still to be said.
    """
    fcntl = pytest.importorskip("fcntl", reason="needs pipes of a chosen size")
    if not hasattr(fcntl, "F_SETPIPE_SZ"):
        pytest.skip("needs pipes of a chosen size, which Linux has")
    checkpoint(tmp_path / "model")
    requests = [
        {"system": "Be brief. " * 3, "prompt": f"Question {n}?", "new": 120 - 2 * n} for n in range(40)
    ]
    (tmp_path / "requests").write_text("\n".join(map(json.dumps, requests)))
    model = ["--model", tmp_path / "model"]
    settings = [*model, "--requests", tmp_path / "requests", "--page", 8, "--pages", 300, "--chunk", 32]
    whole = said_by_main(monkeypatch, capsys, *settings, "--json", tmp_path / "whole").out.encode()

    folder, lines, read = tmp_path / "kept", random.randrange(20, 60), b""
    process = subprocess.Popen(
        [sys.executable, SERVE / "serve.py", *map(str, settings), "--snapshot", folder, "--every", "10"],
        stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )
    fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
    while read.count(b"\n") < lines or not (folder / snapshot.STATE).exists():
        letter = os.read(process.stdout.fileno(), 1)
        assert letter, "it ended before it was killed"
        read += letter
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert whole.startswith(read) and len(whole) > len(read) + 4096

    again = said_by_main(monkeypatch, capsys, *model, "--resume", folder, "--json", tmp_path / "again")
    assert "goes on after step" in again.err
    whole, again = (json.loads((tmp_path / name).read_text()) for name in ("whole", "again"))
    assert again["tokens"] == whole["tokens"]
    assert [len(tokens) for tokens in again["tokens"]] == [r["new"] for r in requests]
    for total in ("steps", "read", "written", "most_pages"):
        assert again["totals"][total] == whole["totals"][total]


# ---- what is seen, and what is refused -----------------------------------------------------------------------


def test_the_table_shows_who_does_what():
    console = pytest.importorskip("rich.console", reason="needs rich")
    engine = engine_for({**ENOUGH, "most": 2})
    for _ in range(12):
        engine.step()
    file = io.StringIO()
    terminal = console.Console(file=file, width=100, height=30, force_terminal=True)
    with Table(engine, lambda tokens: " ".join(map(str, tokens)), terminal) as table:
        table.update()
        said = file.getvalue()
    assert "waits" in said and "writes" in said and "of 12 done" in said
    r = next(r for r in engine.running if r.written)
    assert " ".join(map(str, r.written)) in said
    assert len(file.getvalue()[len(said) :].splitlines()) > 12  # what each wrote


LONG = [5] * 600


@pytest.mark.parametrize(
    ("says", "call"),
    {
        "most must be >= 1, got 0": lambda e: Engine(e.model, **{**ENOUGH, "most": 0}),
        "new must be >= 1, got 0": lambda e: e.submit([1, 2], 0),
        r"must have 1 to 512 tokens, got 600 \+ 5": lambda e: e.submit(LONG, 5),
        r"must have 1 to 512 tokens, got 0 \+ 5": lambda e: e.submit([], 5),
        "prompt must begin with prefix 0 and go on, got 37 tokens": lambda e: e.submit(
            e.prefixes[0].prompt, 5, 0
        ),
        "prompt must begin with prefix 1": lambda e: e.submit([1, *e.prefixes[1].prompt, 2], 5, 1),
        "pages must be at least 28 for a prompt of 100 tokens and 5 more, got 27": lambda e: Engine(
            e.model, **{**ENOUGH, "pages": 27}
        ).submit(LONG[:100], 5),
    }.items(),
)
def test_each_mistake_has_its_sentence(says, call):
    engine = engine_for(ENOUGH)
    with pytest.raises(ValueError, match=says):
        call(engine)
    assert len(engine.requests) == 12


def test_just_enough_pages_are_enough():
    engine = Engine(Ragged(made()), **{**ENOUGH, "pages": 28})
    engine.submit(LONG[:100], 5)
    assert [len(w) for w in finished(engine)] == [5]
    assert engine.totals.most_pages == 26  # the last token written is never read


def test_a_snapshot_is_for_one_model(tmp_path):
    engine = engine_for(ENOUGH)
    engine.step()
    with pytest.raises(ValueError, match="is no snapshot"):
        snapshot.load(tmp_path, engine.model, 1)
    weights = snapshot.weights_of(engine.model.model)
    snapshot.save(tmp_path, engine, weights)
    other = made()
    assert snapshot.weights_of(other) == weights
    other.lm_head.weight.data[7, 7] += 1
    with pytest.raises(ValueError, match="another model or other weights"):
        snapshot.load(tmp_path, engine.model, snapshot.weights_of(other))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_types", ["chunked_attention", "full_attention"]),
        ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        ("rope_parameters", None),
    ],
)
def test_models_that_need_more_are_refused(field, value):
    model = made()
    setattr(model.config, field, value)
    with pytest.raises(ValueError, match=f"config.{field}"):
        Ragged(model)
