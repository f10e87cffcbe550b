"""A narrowed model's configuration is its own: what shares the old object is left as it was."""

import copy

import pytest
import torch

import grail
from grail.errors import InputError

CASES = [("llama", "mlp"), ("phi3", "heads"), ("gpt2", "mlp"), ("bert", "mlp"), ("vit", "heads")]
CASES += [("mixtral", "experts"), ("qwen2_moe", "shared_experts"), ("siglip_text_model", "mlp")]


def of_one_configuration(tiny_model, family, **config):
    """Two models that share every configuration object, as if made of one."""
    first = tiny_model(family, **config)
    shared = {
        id(module.config): module.config for module in first.modules() if "config" in vars(module)
    }
    return first, copy.deepcopy(first, dict(shared))


def composite(**sizes):
    """A language model beside a vision tower."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    text = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": 97}
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 4, "image_size": 16, "patch_size": 4}
    config = LlavaConfig(
        text_config={"model_type": "llama", **text},
        vision_config={"model_type": "clip_vision_model", **vision},
        image_token_index=96,
    )
    return [LlavaForConditionalGeneration(config).eval() for _ in range(2)]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_model_of_the_same_configuration_still_saves_and_loads(
    family, kind, tiny_model, tiny_inputs, tmp_path
):
    narrow, dense = of_one_configuration(tiny_model, family)
    batches = tiny_inputs(family, 20)
    before, said = narrow.config, narrow.config.to_dict()
    assert dense.config is before
    grail.compress(narrow, batches, keep=0.5, sites=(kind,), progress=False)
    assert dense.config is before
    assert before.to_dict() == said != narrow.config.to_dict()
    reading = [module for module in narrow.modules() if "config" in vars(module)]
    assert all(module.config is narrow.config for module in reading)
    for model in (dense, narrow):
        model.save_pretrained(tmp_path / str(id(model)))
        again = type(model).from_pretrained(tmp_path / str(id(model))).eval()
        with torch.no_grad():
            assert torch.equal(again(**batches[0])[0], model(**batches[0])[0])


def test_biases_are_announced_in_the_configuration_of_their_own_model(tiny_model, tiny_batches):
    narrow, dense = of_one_configuration(tiny_model, "llama")
    grail.compress(
        narrow, tiny_batches(10), keep=0.5, compensate=False, fit_bias=True, progress=False
    )
    assert (narrow.config.mlp_bias, dense.config.mlp_bias) == (True, False)


@pytest.mark.parametrize("bias", [{}, {"compensate": False, "fit_bias": True}], ids=["", "bias"])
def test_a_failed_run_leaves_the_very_same_configuration(bias, tiny_llama, tiny_batches):
    model, calls = tiny_llama(), []
    before = [(module, module.config) for module in model.modules() if "config" in vars(module)]
    said = model.config.to_dict()

    def fails(view):
        calls.append(view)
        if len(calls) > 1:
            raise InputError("no more")
        return view.width.best(view.rows.norm(dim=1))

    with pytest.raises(InputError, match="no more"):
        grail.compress(model, tiny_batches(), selector=fails, progress=False, **bias)
    assert all(module.config is config for module, config in before)
    assert model.config.to_dict() == said


def test_a_model_narrowed_twice_keeps_what_others_share(tiny_llama, tiny_batches):
    narrow = tiny_llama()
    grail.compress(narrow, tiny_batches(10), keep=0.75, progress=False)
    once = copy.deepcopy(narrow, {id(narrow.config): narrow.config})
    grail.compress(narrow, tiny_batches(10), keep=0.5, progress=False)
    assert once.config.intermediate_size == once.model.layers[0].mlp.up_proj.out_features
    assert narrow.config.intermediate_size == narrow.model.layers[0].mlp.up_proj.out_features


def test_a_part_of_a_composite_model_changes_what_that_one_says_and_no_other(
    tiny_batches, tmp_path
):
    narrow, dense = composite()
    part = narrow.model.language_model
    assert narrow.config is dense.config
    assert part.config is dense.config.text_config
    batches = tiny_batches(10)
    grail.compress(part, batches, keep=0.5, progress=False)
    assert narrow.config.text_config is narrow.model.config.text_config is part.config
    assert narrow.config.vision_config is dense.config.vision_config
    sizes = [model.config.text_config.intermediate_size for model in (narrow, dense)]
    assert sizes == [40, 80]
    for model, name in ((narrow, "narrow"), (dense, "dense")):
        model.save_pretrained(tmp_path / name)
        again = type(model).from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            assert torch.equal(again(batches[0]).logits, model(batches[0]).logits)


def test_a_wrapper_of_teacher_and_student_changes_the_student_alone(tiny_model, tiny_batches):
    narrow, dense = of_one_configuration(tiny_model, "llama")
    both = torch.nn.Module()
    both.teacher, both.student, both.config = dense, narrow, narrow.config
    grail.compress(narrow, tiny_batches(10), keep=0.5, progress=False)
    assert dense.config.intermediate_size == 80
    assert dense.model.config is dense.config


def convolutional(name):
    """A convolutional network of transformers, and a site of it by name."""
    import transformers as tf

    sizes = {"hidden_sizes": [7, 11], "depths": [2, 2], "num_labels": 3}
    if name == "resnet":
        config = tf.ResNetConfig(embedding_size=7, layer_type="basic", **sizes)
        layers = "resnet.encoder.stages.0.layers.0.layer"
        site = ([f"{layers}.0.convolution"], [f"{layers}.1.convolution"])
        return tf.ResNetForImageClassification(config).eval(), [
            grail.Site(*site, [f"{layers}.0.normalization"])
        ]
    sizes["num_stages"] = 2
    model = tf.ConvNextForImageClassification(tf.ConvNextConfig(**sizes)).eval()
    layers = "convnext.encoder.stages.0.layers.0"
    return model, [grail.Site([f"{layers}.pwconv1"], [f"{layers}.pwconv2"])]


@pytest.mark.parametrize("keep", [0.5, 1.0])
@pytest.mark.parametrize(
    ("name", "named"), [("resnet", False), ("resnet", True), ("convnext", True)]
)
def test_the_report_says_where_a_configuration_cannot_hold_the_widths(name, named, keep, tmp_path):
    model, sites = convolutional(name)
    batches = [torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))]
    sites = sites if named else None
    report = grail.compress(model, batches, keep, sites, multiple=1, progress=False)
    assert any("grail.save" in note for note in report.notes) is (keep < 1)
    grail.save(model, tmp_path / "narrow")
    loaded = grail.load(tmp_path / "narrow", lambda: convolutional(name)[0])
    with torch.no_grad():
        assert torch.equal(loaded.eval()(batches[0]).logits, model(batches[0]).logits)


def test_a_network_without_a_configuration_needs_no_such_note():
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))
    site = grail.Site(["0"], ["2"])
    report = grail.compress(model, [torch.randn(11, 5)], 0.5, [site], multiple=1, progress=False)
    assert not any("configuration" in note for note in report.notes)
