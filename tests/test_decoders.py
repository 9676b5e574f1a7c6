"""Decoders that score with the logits of words after a prompt, such as Qwen3-Reranker."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny_models
import torch
from conftest import WORDS
from interruptions import interrupted_at, interruptible_lce
from tiny_models import CHAT_TEMPLATE, GEMMA_TEMPLATE, MXBAI_TEMPLATE, QWEN_TEMPLATE
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, Qwen3Config

from pyterrier_msft import Contrastive, MonoCE, Stage, fit_sequences

PROMPTS = {
    "qwen3": (QWEN_TEMPLATE, "yes", "no"),
    "qwen2": (MXBAI_TEMPLATE, "1", "0"),
    "gemma": (GEMMA_TEMPLATE, "Yes", None),
    "gemma2": (GEMMA_TEMPLATE, "Yes", "No"),  # its logits are capped
    "llama": (GEMMA_TEMPLATE, "Yes", "No"),
    "gpt2": (GEMMA_TEMPLATE, "Yes", "No"),  # its positions are absolute
}
SHORT = "<|im_start|>q: {query} d: {text}<|im_end|>\n"
BRIEF = Contrastive(max_steps=2, learning_rate=1e-2, batch_size=8)


def new(model, template: str | None = QWEN_TEMPLATE, **settings) -> MonoCE:
    return MonoCE(model, **{"template": template, "max_length": 256, "dtype": "float32", "device": "cpu", **settings})


def plain_scores(model, folder, frame: pd.DataFrame, template: str, true: str, false: str | None) -> np.ndarray:
    """Score one pair at a time, without padding and without truncation."""
    tokenizer, found = AutoTokenizer.from_pretrained(folder), []
    for query, text in zip(frame["query"], frame["text"], strict=True):
        prompt = template.replace("{query}", query).replace("{text}", text)
        with torch.inference_mode():
            ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
            logits = model(**ids).logits[0, -1]
        ids = tokenizer.convert_tokens_to_ids([true, false or true])
        found.append((logits[ids[0]] - (logits[ids[1]] if false else 0)).item())
    return np.array(found)


def of_folder(folder, frame, template: str, true: str = "yes", false: str | None = "no") -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return plain_scores(model, folder, frame, template, true, false)


def of_sentence_transformers(folder, frame: pd.DataFrame) -> np.ndarray:
    sentence_transformers = pytest.importorskip("sentence_transformers", minversion="5.4")
    model = sentence_transformers.CrossEncoder(str(folder), device="cpu")
    # One at a time: it doesn't correct the positions of padded pairs, which changes GPT-2's scores.
    return model.predict([*zip(frame["query"], frame["text"], strict=True)], batch_size=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A decoder of each family."""
    folder = tmp_path_factory.mktemp("decoders")
    for family in PROMPTS:
        tiny_models.write_decoder(folder / family, WORDS, family)
    return folder


@pytest.fixture
def qwen(folders) -> str:
    return str(folders / "qwen3")


@pytest.fixture
def frame(train_part) -> pd.DataFrame:
    """Pairs of different lengths."""
    frame = train_part.results.head(24)
    return frame.assign(text=[" ".join(text.split()[: 1 + i % 6]) for i, text in enumerate(frame["text"])])


# ---- scores, training and saving


@pytest.mark.parametrize("family", PROMPTS)
def test_scores_are_those_of_plain_transformers(family, folders, frame, train_part, tmp_path):
    template, true, false = PROMPTS[family]
    ce = new(folders / family, template, true=true, false=false)
    scores = ce(frame)["score"]
    np.testing.assert_allclose(scores, of_folder(folders / family, frame, template, true, false), atol=1e-5)
    assert np.ptp(scores) > 0.01
    assert not ce.cross_encoder.head_is_new
    ce.fit(train_part.results, train_part.qrels, fitter=BRIEF)
    scores = ce(frame)["score"]
    ce.save(tmp_path / "saved")
    np.testing.assert_allclose(of_folder(tmp_path / "saved", frame, template, true, false), scores, atol=1e-5)
    np.testing.assert_allclose(of_sentence_transformers(tmp_path / "saved", frame), scores, atol=1e-5)
    for loaded in (
        MonoCE.load(tmp_path / "saved", dtype="float32", device="cpu"),
        new(tmp_path / "saved", None),  # with the template of the folder
    ):
        assert loaded.fingerprint == ce.fingerprint
        np.testing.assert_array_equal(loaded(frame)["score"], scores)


def test_a_score_does_not_depend_on_the_batch(folders, frame):
    for family in ("qwen3", "gpt2", "gemma2"):
        scores = [new(folders / family, batch_size=size)(frame)["score"].to_numpy() for size in (1, 7, 24)]
        np.testing.assert_allclose(scores[1:], [scores[0]] * 2, atol=1e-5)


def test_it_learns(qwen, train_part, test_part):
    ce = new(qwen, SHORT, max_length=64)
    ce.fit(train_part.results, train_part.qrels, fitter=Contrastive(max_steps=40, learning_rate=1e-2, batch_size=8))
    assert ce.history["loss"].iloc[-1] < 0.8 * ce.history["loss"].iloc[0]


def test_all_ways_to_compute_a_step_give_the_same_gradient(qwen, train_part):
    data = train_part.results, train_part.qrels
    options = {"max_steps": 2, "learning_rate": 1e-3, "batch_size": 8, "n_negatives": 3}
    weights = []
    for settings in ({}, {"pairs_per_pass": 3}, {"trainer_args": {"gradient_checkpointing": True}}):
        ce = new(qwen, SHORT, max_length=64).fit(*data, fitter=Contrastive(**options, **settings))
        weights.append(torch.cat([p.detach().flatten() for p in ce.cross_encoder.network.parameters()]))
    torch.testing.assert_close(weights[1], weights[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(weights[2], weights[0], atol=1e-4, rtol=0)


def test_half_precision_rounds_no_difference(qwen, train_part):
    """The logits of the words are computed in float32: in bfloat16, many differences would be equal."""
    frame = train_part.results.head(64)
    exact, half = new(qwen)(frame)["score"], new(qwen, dtype="bfloat16")(frame)["score"]
    assert half.nunique() > 50
    assert 0 < np.abs(half - exact).max() < 0.2


def test_copies_and_pickles(qwen, frame, train_part):
    ce = new(qwen)
    assert pickle.loads(pickle.dumps(ce)).fingerprint == ce.fingerprint
    ce.fit(train_part.results, train_part.qrels, fitter=BRIEF)
    expected = ce(frame)["score"]
    for copy in (ce.clone(), pickle.loads(pickle.dumps(ce)), pickle.loads(pickle.dumps(ce.clone()))):
        assert copy.fingerprint == ce.fingerprint
        np.testing.assert_array_equal(copy(frame)["score"], expected)


def test_the_prompt_is_part_of_the_fingerprint(qwen):
    found = [
        new(qwen, template, **words).fingerprint
        for template in (QWEN_TEMPLATE, SHORT)
        for words in ({}, {"true": "no", "false": "yes"}, {"true": "yes"})
    ]
    assert len({*found}) == 6
    assert new(qwen).fingerprint == found[0]


def test_training_is_resumed_and_reused(qwen, train_part, tmp_path):
    data = train_part.results, train_part.qrels
    fitter = Contrastive(max_steps=6, batch_size=8, eval_every=2, n_negatives=3, loss=interruptible_lce)
    whole = new(qwen, SHORT).fit(*data, fitter=fitter)
    with interrupted_at(5), pytest.raises(KeyboardInterrupt):
        new(qwen, SHORT).fit(*data, fitter=fitter, checkpoint_dir=tmp_path / "ck")
    with pytest.raises(ValueError, match=r"another training run: .*start weights"):
        new(qwen, SHORT, true="yes").fit(*data, fitter=fitter, checkpoint_dir=tmp_path / "ck")
    assert new(qwen, SHORT).fit(*data, fitter=fitter, checkpoint_dir=tmp_path / "ck").fingerprint == whole.fingerprint
    stages = {"CL": Stage(BRIEF, *data)}
    first, again = (fit_sequences(new(qwen, SHORT), stages, ["CL"], save_dir=tmp_path / "runs") for _ in range(2))
    assert first["CL"].fingerprint == again["CL"].fingerprint


# ---- LoRA


def test_lora(qwen, frame, train_part, tmp_path):
    peft = pytest.importorskip("peft")
    ce = new(qwen, adapter=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    np.testing.assert_allclose(ce(frame)["score"], of_folder(qwen, frame, QWEN_TEMPLATE), atol=1e-5)  # no effect yet
    ce.fit(train_part.results, train_part.qrels, fitter=Contrastive(max_steps=4, learning_rate=2e-2, batch_size=8))
    trained = {name for name, p in ce.cross_encoder.network.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora" in name for name in trained)
    scores = ce(frame)["score"]
    assert np.abs(scores - of_folder(qwen, frame, QWEN_TEMPLATE)).max() > 1e-3
    ce.save(tmp_path / "adapter", merged=False)
    loaded = MonoCE.load(tmp_path / "adapter", dtype="float32", device="cpu")
    assert loaded.fingerprint == ce.fingerprint
    np.testing.assert_array_equal(loaded(frame)["score"], scores)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter")).eval()
    found = plain_scores(theirs, qwen, frame, QWEN_TEMPLATE, "yes", "no")
    np.testing.assert_allclose(found, scores, atol=1e-5)
    loaded.fit(train_part.results, train_part.qrels, fitter=BRIEF)  # in a second stage
    ce.save(tmp_path / "merged")
    np.testing.assert_allclose(of_folder(tmp_path / "merged", frame, QWEN_TEMPLATE), scores, atol=1e-5)
    np.testing.assert_allclose(of_sentence_transformers(tmp_path / "merged", frame), scores, atol=1e-5)
    assert "AutoModel" not in (tmp_path / "adapter/README.md").read_text() + (tmp_path / "merged/README.md").read_text()


def test_the_layer_of_the_words_has_no_adapter(qwen):
    peft = pytest.importorskip("peft")
    for targets in (["q_proj", "lm_head"], "lm_head|.*q_proj"):
        lora = peft.LoraConfig(r=4, target_modules=targets)
        unusable(qwen, "adapter must not have target_modules with 'lm_head', the layer that scores words", adapter=lora)
    assert new(qwen, adapter=peft.LoraConfig(r=4, target_modules="all-linear")).cross_encoder.has_adapter


# ---- truncation


def parts(ce: MonoCE, query: str, text: str) -> list[int]:
    return ce.pair_encoder()([query], [text])["input_ids"][0]


def test_only_the_text_is_cut(qwen, frame):
    """A cut pair is the whole pair's tokens, without some at the end of the text."""
    tokenizer = AutoTokenizer.from_pretrained(qwen)
    query, text = "w1 w2 w3", " ".join(WORDS)
    for template in (
        QWEN_TEMPLATE,
        MXBAI_TEMPLATE,
        "{text}<|im_start|>{query}?",
        "q:{query} d:{text}",
        "{query}{text}",
    ):
        whole = tokenizer(template.replace("{query}", query).replace("{text}", text), add_special_tokens=False)
        start = tokenizer(template.partition("{text}")[0].replace("{query}", query), add_special_tokens=False)
        end = tokenizer(template.partition("{text}")[2].replace("{query}", query), add_special_tokens=False)
        for room in (8, 50):  # beside the query, which has 6 tokens
            length = len(start["input_ids"]) + len(end["input_ids"]) + room
            found = parts(new(qwen, template, max_length=length), query, text)
            assert len(found) == length
            kept = len(found) - len(end["input_ids"])
            assert found == whole["input_ids"][:kept] + end["input_ids"]
        assert parts(new(qwen, template, max_length=512), query, text) == whole["input_ids"]


def test_cut_pairs_score_as_in_sentence_transformers(qwen, frame, tmp_path):
    ce = new(qwen, max_length=118)
    frame = frame.assign(text=[" ".join(WORDS[i:][:40]) for i in range(len(frame))])
    assert {len(parts(ce, *pair)) for pair in zip(frame["query"], frame["text"], strict=True)} == {118}
    ce.save(tmp_path)
    np.testing.assert_allclose(of_sentence_transformers(tmp_path, frame), ce(frame)["score"], atol=1e-5)


def test_long_queries_leave_room_for_the_text(qwen):
    tokenizer = AutoTokenizer.from_pretrained(qwen)
    overhead = len(tokenizer(SHORT.replace("{query}", "").replace("{text}", ""))["input_ids"])
    ce, long = new(qwen, SHORT, max_length=overhead + 20), " ".join(WORDS[:30])
    words = tokenizer.decode(parts(ce, long, long)).split()
    assert 7 <= len([word for word in words if word in WORDS]) <= 20
    assert tokenizer.decode(parts(ce, long, long)).endswith("<|im_end|>\n")
    with pytest.warns(UserWarning, match="1 of 1 distinct queries to score are truncated"):
        ce(pd.DataFrame([("q", long, "d", long)], columns=["qid", "query", "docno", "text"]))
    rates = ce.pair_encoder().truncation_rates(["w1", long], [long, "w1"])
    assert rates == (0.5, 0.5)
    capped = new(qwen, SHORT, max_length=overhead + 20, max_query_length=2)
    assert tokenizer.decode(parts(capped, long, "w99")).count("w9") == 1
    assert len(parts(capped, long, "w99")) < overhead + 10


def test_pairs_never_exceed_the_length(qwen):
    rng = np.random.default_rng(0)
    letters = [*"abc 01.,\n", "é", "🙂", " w1", "<|im_end|>", "yes"]
    for _ in range(200):
        query, text = ("".join(rng.choice(letters, rng.integers(0, 60))) for _ in range(2))
        ce = new(qwen, SHORT, max_length=int(rng.integers(18, 60)), passages=int(rng.integers(1, 3)))
        encoded, pair = ce.pair_encoder().windows([query], [text])
        assert encoded.lengths.max() <= ce.max_length, (query, text, ce.max_length)
        assert not pair.any()


def test_passages(qwen):
    tokenizer = AutoTokenizer.from_pretrained(qwen)
    ce = new(qwen, SHORT, max_length=40, passages=3)
    text = " ".join(WORDS[:40])
    encoded, pair = ce.pair_encoder().windows(["w1", "w2"], [text, "w3"])
    assert pair.tolist() == [0, 0, 0, 1]
    windows = [tokenizer.decode(ids) for ids in encoded["input_ids"]]
    assert all(window.startswith("<|im_start|>q: w") and window.endswith("<|im_end|>\n") for window in windows)
    assert len({*windows}) == 4
    frame = pd.DataFrame([("q", "w1", "d", text)], columns=["qid", "query", "docno", "text"])
    whole = new(qwen, SHORT, max_length=40, passages=3)(frame)["score"].item()
    model = AutoModelForCausalLM.from_pretrained(qwen).eval()
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    with torch.inference_mode():
        logits = [model(torch.tensor([ids])).logits[0, -1] for ids in encoded["input_ids"][:3]]
    assert whole == pytest.approx(max((row[yes] - row[no]).item() for row in logits), abs=1e-5)


# ---- templates from the files of sentence-transformers


STRUCTURED = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>
{% endfor %}"""


def published(folder: Path, model: str, chat_template: str, **options) -> str:
    shutil.copytree(model, folder)
    tiny_models.write_integration(folder, chat_template, **options)
    return str(folder)


@pytest.mark.parametrize(
    ("chat_template", "options"),
    [
        (CHAT_TEMPLATE, {}),
        (CHAT_TEMPLATE, {"false": None}),
        (CHAT_TEMPLATE, {"prompt": "Given a 'web' search query,\\find {passages}"}),
        (STRUCTURED, {}),
    ],
)
def test_the_template_of_a_published_reranker(chat_template, options, qwen, frame, train_part, tmp_path):
    folder = published(tmp_path / "model", qwen, chat_template, **options)
    ce = new(folder, None)
    np.testing.assert_allclose(ce(frame)["score"], of_sentence_transformers(folder, frame), atol=1e-5)
    ce.fit(train_part.results, train_part.qrels, fitter=BRIEF)
    ce.save(tmp_path / "saved")
    np.testing.assert_allclose(of_sentence_transformers(tmp_path / "saved", frame), ce(frame)["score"], atol=1e-5)
    assert new(tmp_path / "saved", None).fingerprint == ce.fingerprint
    # Another template, with the folder's words or others
    true, false = AutoTokenizer.from_pretrained(qwen).convert_ids_to_tokens([9, 5])
    own = of_folder(folder, frame, SHORT, true, None if options.get("false", 5) is None else false)
    np.testing.assert_allclose(new(folder, SHORT)(frame)["score"], own, atol=1e-5)
    others = new(folder, SHORT, true="yes", false="no")
    np.testing.assert_allclose(others(frame)["score"], of_folder(folder, frame, SHORT), atol=1e-5)


def test_a_classifier_with_a_prompt(frame, train_part, tmp_path):
    """Such as the conversions of Qwen3-Reranker to a classifier with one label."""
    ce = new(write_classifier(tmp_path / "model"))
    ce.fit(train_part.results, train_part.qrels, fitter=BRIEF)
    ce.save(tmp_path / "saved")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    with torch.inference_mode():
        expected = [
            model(**tokenizer(QWEN_TEMPLATE.replace("{query}", q).replace("{text}", t), return_tensors="pt")).logits
            for q, t in zip(frame["query"], frame["text"], strict=True)
        ]
    np.testing.assert_allclose(ce(frame)["score"], torch.cat(expected)[:, 0], atol=1e-5)
    np.testing.assert_allclose(of_sentence_transformers(tmp_path / "saved", frame), ce(frame)["score"], atol=1e-5)
    assert new(tmp_path / "saved", None).fingerprint == ce.fingerprint
    assert "longer than 256 tokens, template included" in (tmp_path / "saved/README.md").read_text()


def write_classifier(folder: Path, *, labels: int = 1) -> Path:
    size = tiny_models.write_bpe(folder, WORDS)
    config = Qwen3Config.from_dict({**tiny_models.decoder_config("qwen3", size).to_dict(), "num_labels": labels})
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


def test_a_prompt_and_several_labels(frame, train_part, tmp_path):
    ce = new(write_classifier(tmp_path / "model", labels=3), SHORT, relevant=1)
    ce.fit(train_part.results, train_part.qrels, fitter=BRIEF)
    ce.save(tmp_path / "saved")
    loaded = MonoCE.load(tmp_path / "saved", dtype="float32", device="cpu")
    assert (loaded.relevant, loaded.template, loaded.fingerprint) == (1, SHORT, ce.fingerprint)
    np.testing.assert_array_equal(loaded(frame)["score"], ce(frame)["score"])
    assert "log-odds of the label 1" in (tmp_path / "saved/README.md").read_text()


def test_a_classifier_does_not_keep_an_ordinary_chat_template(frame, train_part, tmp_path):
    """Otherwise, sentence-transformers would apply it."""
    folder = write_classifier(tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}")
    ce = new(folder, None).fit(train_part.results, train_part.qrels, fitter=BRIEF)
    ce.save(tmp_path / "saved")
    np.testing.assert_allclose(of_sentence_transformers(tmp_path / "saved", frame), ce(frame)["score"], atol=1e-5)


def test_a_classifier_in_memory_keeps_its_prompt(frame, tmp_path):
    """Several re-rankers may share a network."""
    model = AutoModelForSequenceClassification.from_pretrained(write_classifier(tmp_path / "model"))
    rerankers = {template: new(model, template) for template in (SHORT, QWEN_TEMPLATE, None)}
    scores = {template: ce(frame)["score"].to_numpy() for template, ce in rerankers.items()}
    for template, found in scores.items():
        np.testing.assert_array_equal(new(tmp_path / "model", template)(frame)["score"], found)
    assert not hasattr(model, "prompt")


def test_shared_weights_are_pickled_with_their_prompt(tmp_path):
    folder = write_classifier(tmp_path / "model")
    short, long = new(folder, SHORT), new(folder)
    long.take_weights(short)
    assert pickle.loads(pickle.dumps(long)).fingerprint == short.fingerprint


def test_only_the_last_token_is_scored(qwen, frame):
    ce, sizes = new(qwen), []
    layer = ce.cross_encoder.network.get_output_embeddings()
    layer.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[1:]))
    ce(frame)
    assert {*sizes} == {(1, 2)}


# ---- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"true": "no", "false": "no"}, "true and false must be different words; got 'no' twice"),
        ({"true": ""}, "true must be a word or None; got ''"),
        ({"true": 1, "false": 0}, "true must be a word or None; got 1"),  # not the ids of tokens
        ({"true": "yes", "false": 0.5}, "false must be a word or None; got 0.5"),
        ({"false": "no"}, "true is required with false='no'; got None"),
    ],
)
def test_invalid_prompts(qwen, settings, message):
    with pytest.raises(ValueError, match=message):
        new(qwen, **settings)


def unusable(model, match: str, **settings) -> None:
    with pytest.raises(ValueError, match=match):
        new(model, **settings).pair_encoder()


def test_prompts_that_do_not_suit_the_model(qwen, tmp_path):
    unusable(qwen, r"template is required for '.*', which generates text \(Qwen3ForCausalLM\); got None", template=None)
    unusable(qwen, "true must be a single token of the model; got 'yes indeed', which has", true="yes indeed")
    unusable(published(tmp_path / "ids", qwen, CHAT_TEMPLATE, false=10**6), "must have token ids below .*, not 1000000")
    with pytest.raises(ValueError, match=r"got Qwen3ForCausalLM\. Save .* and give MonoCE the folder"):
        new(AutoModelForCausalLM.from_pretrained(qwen))
    unusable(qwen, "max_length must be at least .*, since the template has .* tokens; got 16", max_length=16)
    broken = published(tmp_path / "broken", qwen, "{{ raise_exception('no pairs') }}")
    unusable(broken, "its chat template fails: no pairs. Pass template= to MonoCE", template=None)
    (tmp_path / "broken/chat_template.jinja").write_text("{{ messages[0].content }}")
    unusable(
        broken, "its chat template doesn't have a query and a document once. Pass template= to MonoCE", template=None
    )
    for change in ("trim", "lower", "truncate(9000)", "escape"):
        changed = CHAT_TEMPLATE.replace("| first }}<|im_end|>", f"| first | {change} }}}}<|im_end|>")
        (tmp_path / "broken/chat_template.jinja").write_text(changed)
        unusable(broken, "its chat template changes the text. Pass template= to MonoCE", template=None)
    (tmp_path / "broken/chat_template.jinja").unlink()
    unusable(broken, "its configuration has no chat template for pairs. Pass template= to MonoCE", template=None)
    assert len(new(broken).fingerprint) == 16
