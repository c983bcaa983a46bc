"""Codecs against their formulas written out; what codes depend on, and what they must not depend on."""

import itertools
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from fastmae.errors import InputError
from fastmae.tokens.codec import code_layout, learns, load_codec, parse_codec
from fastmae.tokens.learn import deal, learn_codec, learn_from, share_variance

C = 48
NAMES = [
    "fp32",
    "fp16",
    "int8",
    "pq1",
    "pq12",
    "pq13",
]  # 13 does not divide 48: groups of 4 directions, the last ones of 3


def correlated(count, seed, dim=C):
    """float32 [count, dim]: like a ViT's tokens, a few directions hold most of the variance, and channels differ in mean and deviation."""
    mixing = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(0)))[0]
    made = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, dim + 1) ** -0.7
    clumps = torch.randn(40, dim, generator=torch.Generator().manual_seed(1))[
        torch.randint(40, (count,), generator=made)
    ]
    tokens = (0.6 * torch.randn(count, dim, generator=made) + clumps) * spectrum @ mixing
    return 20 * tokens * torch.linspace(0.5, 2, dim) + torch.linspace(-3, 3, dim)


@pytest.fixture(scope="module")
def codecs():
    sample = correlated(4000, seed=2)
    return {name: learn_codec(name, sample, seed=0) for name in NAMES}


def relative_error(codec, tokens):
    decoded = codec.decode(torch.from_numpy(codec.encode(tokens)))
    return float(((decoded - tokens).norm(dim=-1) / tokens.norm(dim=-1)).mean())


def by_formula(tensors, codes):
    """The module docstring's formula, token by token and group by group."""
    kept = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    groups, _, width = kept["centroids"].shape
    tokens = np.zeros((len(codes), len(kept["offset"])))
    for row, code in enumerate(codes):
        for m in range(groups):
            tokens[row] += kept["centroids"][m, code[m]] @ kept["inverse"][m * width : (m + 1) * width]
    return kept["offset"] + tokens


@pytest.mark.parametrize("name", ["pq12", "pq13"])
def test_a_code_is_the_nearest_centroid_of_its_group(name, codecs):
    tokens = correlated(150, seed=3)
    kept = {key: tensor.astype(np.float64) for key, tensor in codecs[name].tensors().items()}
    groups, _, width = kept["centroids"].shape
    turned = (tokens.double().numpy() - kept["offset"]) @ kept["forward"]
    codes = codecs[name].encode(tokens)
    for token, code in zip(turned, codes, strict=True):
        for m in range(groups):
            distances = ((kept["centroids"][m] - token[m * width : (m + 1) * width]) ** 2).sum(1)
            assert distances[code[m]] <= distances.min() + 1e-4


@pytest.mark.parametrize("name", ["pq1", "pq12", "pq13"])
def test_a_decoded_token_is_the_sum_of_its_codes_rows(name, codecs):
    codec = codecs[name]
    codes = codec.encode(correlated(100, seed=3))
    expected = torch.from_numpy(by_formula(codec.tensors(), codes)).float()
    torch.testing.assert_close(codec.decode(torch.from_numpy(codes)), expected, rtol=2e-3, atol=2e-2)


def test_tokens_beyond_fp16s_numbers_are_quantised_all_the_same():
    sample = 1e6 * correlated(1000, seed=2)
    codec = learn_codec("pq24", sample, seed=0)
    assert relative_error(codec, sample) < 0.2


def test_the_two_ways_of_decoding_agree(codecs):
    quantiser = codecs["pq12"].quantiser
    codes = torch.from_numpy(codecs["pq12"].encode(correlated(300, seed=3)))
    torch.testing.assert_close(
        quantiser.decode_by_sums(codes), quantiser.decode_by_product(codes), rtol=2e-3, atol=2e-2
    )


def test_decoding_is_the_same_under_autocast(codecs):
    quantiser = codecs["pq12"].quantiser
    codes = torch.from_numpy(codecs["pq12"].encode(correlated(30, seed=3)))
    for decode in (quantiser.decode_by_sums, quantiser.decode_by_product):
        with torch.autocast("cpu", torch.bfloat16):
            inside = decode(codes)
        assert torch.equal(inside, decode(codes))


def test_int8_is_the_nearest_of_256_steps(codecs):
    tokens = correlated(200, seed=3)
    offset, scale = (codecs["int8"].tensors()[name] for name in ("offset", "scale"))
    codes = codecs["int8"].encode(tokens)
    expected = np.clip(np.rint((tokens.numpy() - offset) / scale), 0, 255)
    np.testing.assert_array_equal(codes, expected)
    torch.testing.assert_close(
        codecs["int8"].decode(torch.from_numpy(codes)), torch.from_numpy(offset + scale * codes.astype(np.float32))
    )
    unclipped = (expected > 0) & (expected < 255)
    assert unclipped.mean() > 0.999
    error = np.abs(codecs["int8"].decode(torch.from_numpy(codes)).numpy() - tokens.numpy())
    assert (error <= 0.501 * scale)[unclipped].all()


def test_int8s_range_is_not_set_by_one_token_gone_astray():
    sample = correlated(4000, seed=2)
    calm = learn_codec("int8", sample, seed=0).tensors()["scale"]
    sample[17] = 1e6
    np.testing.assert_allclose(learn_codec("int8", sample, seed=0).tensors()["scale"], calm, rtol=0.05)


def test_numbers_beyond_int8s_range_are_clamped_to_its_ends(codecs):
    far = torch.stack([torch.full((C,), -1e9), torch.full((C,), 1e9)])
    assert np.array_equal(codecs["int8"].encode(far), np.repeat([[0], [255]], C, axis=1))


@pytest.mark.parametrize("name", NAMES)
def test_codes_have_the_layout_that_was_foretold(name, codecs):
    code_dim, dtype = code_layout(name, C)
    codes = codecs[name].encode(correlated(2 * 3 * 3, seed=3).reshape(2, 3, 3, C))
    assert (codes.shape, codes.dtype) == ((2, 3, 3, code_dim), dtype)
    assert (codecs[name].code_dim, codecs[name].dtype) == (code_dim, dtype)
    tokens = codecs[name].decode(torch.from_numpy(codes))
    assert (tokens.shape, tokens.dtype) == ((2, 3, 3, C), torch.float32)


def test_layouts_by_name():
    assert code_layout("fp32", 384) == (384, np.float32)
    assert code_layout("fp16", 384) == (384, np.float16)
    assert code_layout("int8", 384) == (384, np.uint8)
    assert code_layout("pq48", 384) == (48, np.uint8)
    assert [learns(name) for name in NAMES] == [False, False, True, True, True, True]


def test_floats_come_back_as_they_were():
    tokens = correlated(64, seed=3)
    fp32, fp16 = load_codec("fp32", C, {}), load_codec("fp16", C, {})
    assert torch.equal(fp32.decode(torch.from_numpy(fp32.encode(tokens))), tokens)
    assert torch.equal(fp16.decode(torch.from_numpy(fp16.encode(tokens))), tokens.half().float())
    assert fp32.tensors() == fp16.tensors() == learn_codec("fp16", tokens, seed=0).tensors() == {}


@pytest.mark.parametrize("name", NAMES)
def test_encoding_what_was_decoded_gives_the_same_codes(name, codecs):
    codes = codecs[name].encode(correlated(500, seed=3))
    again = codecs[name].encode(codecs[name].decode(torch.from_numpy(codes)))
    assert (
        again != codes
    ).mean() < 1e-3  # pq decodes to float16's precision, so two centroids that all but coincide may swap


def test_more_bytes_lose_less():
    sample, held_out = correlated(2000, seed=2), correlated(500, seed=3)
    errors = [
        relative_error(learn_codec(name, sample, seed=0), held_out)
        for name in ("pq2", "pq4", "pq8", "pq16", "pq24", "int8", "fp16")
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.3 and errors[4] < 0.15 and errors[5] < 0.02


def test_the_shared_out_rotation_loses_less_than_channels_as_they_come(codecs):
    import faiss

    sample, held_out = correlated(4000, seed=2), correlated(500, seed=3)
    plain = faiss.ProductQuantizer(C, 12, 8)
    plain.cp.min_points_per_centroid = 1
    plain.train(sample.numpy())
    decoded = torch.from_numpy(plain.decode(plain.compute_codes(held_out.numpy())))
    lost = float(((decoded - held_out).norm(dim=1) / held_out.norm(dim=1)).mean())
    assert relative_error(codecs["pq12"], held_out) < 0.8 * lost


@pytest.mark.parametrize("groups", [1, 12, 13, C])
def test_the_rotation_holds_each_principal_direction_once(groups):
    tokens = correlated(2000, seed=2)
    tokens = tokens - tokens.mean(0)
    rotation = share_variance(tokens, groups)
    directions = rotation[rotation.norm(dim=1) > 0]
    torch.testing.assert_close(directions @ directions.T, torch.eye(C), rtol=0, atol=1e-5)
    covariance = (tokens @ directions.T).T @ (tokens @ directions.T)
    off_diagonal = covariance - covariance.diag().diag()
    assert off_diagonal.abs().max() < 1e-4 * covariance.max()
    assert all((group.norm(dim=1) > 0).any() for group in rotation.unflatten(0, (groups, -1)))


def test_the_largest_loads_go_to_different_groups_and_the_sums_are_alike():
    loads = [9.0, 7.0, 5.0, 4.0, 3.0, 2.0, 1.0, 1.0]
    members = deal(loads, groups=2, width=4)
    assert sorted(itertools.chain(*members)) == list(range(8))
    assert [sum(loads[place] for place in group) for group in members] == [16.0, 16.0]
    assert all(len(group) <= 3 for group in deal(loads, groups=3, width=3))


@pytest.mark.parametrize("name", NAMES)
def test_codes_do_not_depend_on_the_batch_that_they_came_in(name, codecs):
    tokens = correlated(333, seed=3)
    whole = codecs[name].encode(tokens)
    for size in (1, 7, 64, 200):
        assert np.array_equal(np.concatenate([codecs[name].encode(part) for part in tokens.split(size)]), whole)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    assert np.array_equal(codecs[name].encode(tokens[order]), whole[order])
    assert codecs[name].encode(tokens[:0]).shape == (0, codecs[name].code_dim)
    assert codecs[name].decode(torch.from_numpy(whole[:0])).shape == (0, C)


ELSEWHERE = """
import sys, torch
from safetensors.numpy import load_file, save_file
from fastmae.tokens.codec import load_codec
from fastmae.tokens.learn import learn_codec
assert "faiss" not in sys.modules, "only learning needs faiss"
torch.set_num_threads(3)
given, out = load_file(sys.argv[1]), {}
sample, tokens = (torch.from_numpy(given.pop(name)) for name in ("sample", "tokens"))
for name in ("int8", "pq13"):
    kept = {key.removeprefix(name): value for key, value in given.items() if key.startswith(name)}
    out[name + "codes"] = load_codec(name, tokens.shape[-1], kept).encode(tokens)
assert "faiss" not in sys.modules, "only learning needs faiss"
for name in ("int8", "pq13"):
    out |= {name + key: value for key, value in learn_codec(name, sample, seed=0).tensors().items()}
assert torch.get_num_threads() == 3
save_file(out, sys.argv[2])
"""


def test_another_process_with_other_threads_learns_the_same_bytes_and_encodes_to_the_same_codes(codecs, tmp_path):
    tokens = correlated(1000, seed=3)
    given = {"sample": correlated(4000, seed=2).numpy(), "tokens": tokens.numpy()}
    learnt = {name + key: value for name in ("int8", "pq13") for key, value in codecs[name].tensors().items()}
    save_file(given | learnt, tmp_path / "given.safetensors")
    subprocess.run(
        [sys.executable, "-c", ELSEWHERE, tmp_path / "given.safetensors", tmp_path / "out.safetensors"], check=True
    )
    out = load_file(tmp_path / "out.safetensors")
    for name in ("int8", "pq13"):
        assert np.array_equal(out.pop(name + "codes"), codecs[name].encode(tokens))
    assert {key: value.tobytes() for key, value in out.items()} == {
        key: value.tobytes() for key, value in learnt.items()
    }


def test_another_seed_starts_the_clustering_elsewhere(codecs):
    other = learn_codec("pq12", correlated(4000, seed=2), seed=2**40 + 1).tensors()
    assert not np.array_equal(other["centroids"], codecs["pq12"].tensors()["centroids"])
    assert np.array_equal(other["inverse"], codecs["pq12"].tensors()["inverse"])


@pytest.mark.parametrize("name", NAMES)
def test_a_codec_comes_back_from_its_tensors_alone(name, codecs):
    loaded = load_codec(name, C, codecs[name].tensors())
    tokens = correlated(100, seed=3)
    codes = codecs[name].encode(tokens)
    assert np.array_equal(loaded.encode(tokens), codes)
    assert torch.equal(loaded.decode(torch.from_numpy(codes)), codecs[name].decode(torch.from_numpy(codes)))


@pytest.mark.parametrize("name", NAMES)
def test_a_codec_travels_to_another_process_without_its_copies(name, codecs):
    codes = torch.from_numpy(codecs[name].encode(correlated(10, seed=3)))
    codecs[name].decode(codes)
    codecs[name].decode(codes.to("meta"))
    sent = pickle.dumps(codecs[name])
    kept = sum(tensor.nbytes for tensor in codecs[name].tensors().values())
    assert len(sent) < kept + 2000
    assert torch.equal(pickle.loads(sent).decode(codes), codecs[name].decode(codes))


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_decoded_on_the_codes_device(name, codecs):
    codes = torch.from_numpy(codecs[name].encode(correlated(10, seed=3))).to("meta")
    assert codecs[name].decode(codes).device.type == "meta"


def test_any_byte_is_a_code_and_nothing_else_is_decoded(codecs):
    every = torch.arange(256, dtype=torch.uint8)
    assert codecs["pq12"].decode(every[:, None].expand(256, 12)).isfinite().all()
    for wrong in (torch.full((2, 12), 256), torch.full((2, 12), -1, dtype=torch.int8), every[:11]):
        with pytest.raises(ValueError, match=r"pq12 has 12 torch\.uint8"):
            codecs["pq12"].decode(wrong)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tokens_that_are_not_finite_are_refused(name, value, codecs):
    tokens = correlated(10, seed=3)
    tokens[7, 5] = value
    with pytest.raises(InputError, match="NaN or infinity"):
        codecs[name].encode(tokens)


def test_numbers_beyond_fp16_are_refused():
    with pytest.raises(InputError, match=r"reach 70000, beyond fp16's 65504; use --codec fp32"):
        load_codec("fp16", C, {}).encode(torch.full((2, C), 7e4))


@pytest.mark.parametrize(
    "name",
    ["pq", "pq0", "pq048", "pqx", "pq-4", "pq 48", "pq48 ", "pq48\n", "PQ48", "pq٤", "pq999999", "int4", "", "bf16"],
)
def test_a_name_that_is_no_codecs_is_answered_with_those_that_are(name):
    for ask in (parse_codec, learns, lambda name: code_layout(name, C), lambda name: load_codec(name, C, {})):
        with pytest.raises(InputError, match=r"no such codec; give fp16, fp32, int8, or pq<M>"):
            ask(name)


def test_more_bytes_than_channels_are_refused_before_anything_is_learnt():
    with pytest.raises(InputError, match=r"--codec pq49: more bytes than a token has channels, 48; give pq48 at most"):
        code_layout("pq49", C)
    assert code_layout("pq48", C) == (48, np.uint8)


@pytest.mark.parametrize(("name", "least"), [("int8", 2), ("pq12", 256)])
def test_a_sample_that_teaches_nothing_is_refused(name, least):
    with pytest.raises(InputError, match=rf"{least - 1} tokens are too few to learn from \({least} at least\)"):
        learn_codec(name, correlated(least - 1, seed=2), seed=0)
    sample = correlated(least, seed=2)
    learn_codec(name, sample, seed=0)
    sample[1, 0] = float("nan")
    with pytest.raises(InputError, match="NaN or infinity"):
        learn_codec(name, sample, seed=0)


@pytest.mark.parametrize("name", ["int8", "pq12", "pq48"])
def test_a_small_or_constant_sample_is_learnt_from_in_silence(name, capfd):
    for sample in (correlated(256, seed=2), torch.full((300, C), 5.0), torch.zeros(300, C)):
        sample[:, 3] = 1.0  # a dead channel
        codec = learn_codec(name, sample, seed=0)
        decoded = codec.decode(torch.from_numpy(codec.encode(sample)))
        torch.testing.assert_close(decoded[:, 3], sample[:, 3], rtol=0, atol=0.1)
        assert codec.decode(torch.from_numpy(codec.encode(1e3 + 1e3 * sample))).isfinite().all()
    assert capfd.readouterr() == ("", "")


def test_without_faiss_learning_pq_says_how_to_get_it_and_all_else_works(codecs, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    sample = correlated(300, seed=2)
    with pytest.raises(InputError, match=r"--codec pq12: .*pip install 'fastmae\[pq\]'"):
        learn_codec("pq12", sample, seed=0)
    codec = load_codec("pq12", C, codecs["pq12"].tensors())
    assert codec.decode(torch.from_numpy(codec.encode(sample))).shape == sample.shape
    learn_codec("int8", sample, seed=0)


DAMAGE = {
    "gone": lambda tensor: None,
    "of another shape": lambda tensor: tensor[:-1],
    "of another rank": lambda tensor: tensor[None],
    "a single number": lambda tensor: tensor.reshape(-1)[:1].reshape(()),
    "of another dtype": lambda tensor: tensor.astype(np.float64),
    "not finite": lambda tensor: np.where(
        np.arange(tensor.size).reshape(tensor.shape) == 3, np.array(np.nan, tensor.dtype), tensor
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("int8", "offset"),
        ("int8", "scale"),
        *(("pq12", part) for part in ("offset", "forward", "inverse", "centroids")),
    ],
)
def test_codebooks_that_are_damaged_are_named(name, tensor, damage, codecs):
    tensors = dict(codecs[name].tensors())
    changed = DAMAGE[damage](tensors.pop(tensor))
    if changed is not None:
        tensors[tensor] = changed
    with pytest.raises(InputError, match=rf"codebooks\.safetensors: .*'{tensor}'.*; bring back the file") as caught:
        load_codec(name, C, tensors)
    assert "\n" not in str(caught.value)


def test_codebooks_of_another_codec_are_refused(codecs):
    for name, others in itertools.permutations(("int8", "pq12", "pq13"), 2):
        if name != "int8":
            with pytest.raises(InputError, match=r"codebooks\.safetensors: "):
                load_codec(name, C, codecs[others].tensors())
    with pytest.raises(InputError, match=r"codebooks\.safetensors"):
        load_codec("pq12", C - 1, codecs["pq12"].tensors())
    tensors = dict(codecs["int8"].tensors(), scale=np.zeros(C, np.float32))
    with pytest.raises(InputError, match="'scale' holds numbers that can't be"):
        load_codec("int8", C, tensors)


def test_the_mean_of_an_images_decoded_tokens_is_its_own(tokens_of_images):
    """Whatever the codes lose, an image keeps the mean in which its category lies; for views of it the same mean is added."""
    tokens = tokens_of_images
    codec = learn_from(
        "pq4", tokens.flatten(0, 2), tokens.mean((1, 2), keepdim=True).expand_as(tokens).flatten(0, 2), 0
    )
    codes, means = (torch.from_numpy(kept) for kept in codec.encode_grids(tokens))
    assert (codes.shape, means.shape, means.dtype) == ((40, 6, 6, 4), (40, 12), torch.float16)
    decoded = codec.decode_grids(codes, means)
    torch.testing.assert_close(decoded.mean((1, 2)), tokens.mean((1, 2)), atol=4e-3, rtol=1e-3)
    assert not torch.allclose(decoded, tokens, atol=0.1)
    view = codec.decode_grids(codes[:, 1:4, 2:5].flatten(1, 2), means)
    torch.testing.assert_close(view, decoded[:, 1:4, 2:5].flatten(1, 2))


def test_without_means_kept_grids_are_tokens_alone(tokens_of_images):
    codec = load_codec("fp32", 12, {})
    codes, means = (torch.from_numpy(kept) for kept in codec.encode_grids(tokens_of_images))
    assert means.shape == (40, 0)
    assert torch.equal(codec.decode_grids(codes, means), tokens_of_images)


@pytest.fixture(scope="module")
def tokens_of_images():
    """40 images of 6 x 6 tokens of 12 channels, each image around a mean of its own."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 6, 6, 12, generator=generator) + 3 * torch.randn(40, 1, 1, 12, generator=generator)
