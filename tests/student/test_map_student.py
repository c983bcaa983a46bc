"""A student of any network of timm: predictions against its heads, gradients, and what it refuses."""

import pytest
import torch

from fastmae.config import PretrainConfig
from fastmae.errors import InputError
from fastmae.student.feature_map import build_network, stage_maps, to_grid
from fastmae.student.loss import StudentLoss
from fastmae.student.map_student import MapStudent
from fastmae.student.student import Student, build_student


@pytest.fixture
def make_map_student():
    """(timm's name, options) -> a student with the grid of `batch`."""

    def make(name="resnet10t", **options):
        torch.manual_seed(0)
        return MapStudent(name, build_network(name, 64, 3), 10, 64, 3, 4, **options).eval()

    return make


def test_every_stage_predicts_the_patches_in_the_order_of_ids_shuffle(make_map_student, batch):
    student, (images, _, ids_shuffle) = make_map_student(), batch
    with torch.no_grad():
        prediction = student(images, ids_shuffle)
        maps = stage_maps(student.encoder, images)
    assert prediction.decoded is None
    assert len(prediction.layers) == len(maps) == 5
    for layer, head, feature_map in zip(prediction.layers, student.layer_heads, maps, strict=True):
        in_order = head(to_grid(feature_map, 4))
        for view in range(len(images)):
            torch.testing.assert_close(layer[view], in_order[view, ids_shuffle[view]])


def test_without_all_layers_the_last_map_alone_has_a_head(make_map_student, batch):
    student, (images, _, ids_shuffle) = make_map_student(all_layers=False), batch
    assert [head[1].in_features for head in student.layer_heads] == [512]
    assert len(student(images, ids_shuffle).layers) == 1


def test_relations_compare_the_features_of_the_stages_asked_for(make_map_student, batch):
    student, (images, _, ids_shuffle) = make_map_student(relation_layers="1,4"), batch
    assert [features.shape[-1] for features in student(images, ids_shuffle).features] == [64, 512]
    with pytest.raises(InputError, match="--relation-layers 5"):
        make_map_student(relation_layers="5")


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "convnext_atto", "vit_tiny_r_s16_p8_224"])
@pytest.mark.parametrize("all_layers", [True, False])
def test_every_parameter_that_is_trained_gets_a_gradient(make_map_student, batch, name, all_layers):
    student, (images, target, ids_shuffle) = make_map_student(name, all_layers=all_layers).train(), batch
    loss = StudentLoss(("cosine",), 1.0, (10,), (1.0,))
    loss(student(images, ids_shuffle), target)["loss"].backward()
    trained = {name: p.grad for name, p in student.named_parameters() if p.requires_grad}
    assert [name for name, gradient in trained.items() if gradient is None] == []


def test_activations_may_be_recomputed_where_timm_can(make_map_student, batch):
    images, target, ids_shuffle = batch
    gradients = []
    for checkpointed in (False, True):
        student = make_map_student("convnext_atto", checkpoint_activations=checkpointed)
        loss = StudentLoss(("mse",), 1.0, (10,), (1.0,))(student(images, ids_shuffle), target)["loss"]
        loss.backward()
        gradients.append(student.encoder.stem[0].weight.grad)
    torch.testing.assert_close(*gradients)
    with pytest.raises(InputError, match="--checkpoint-activations"):
        make_map_student("dla46_c", checkpoint_activations=True)


def options(**given):
    return PretrainConfig(stores=(), run="run", image_size=64, **given)


def test_plain_vits_keep_their_student_with_and_without_timm_in_front():
    students = []
    for name in ("vit_tiny_patch16_224", "timm/vit_tiny_patch16_224"):
        torch.manual_seed(0)
        students.append(build_student(options(encoder=name, encoder_depth=1), 16, 10, 3))
    assert all(type(student) is Student for student in students)
    first, second = (student.state_dict() for student in students)
    assert all(torch.equal(first[name], second[name]) for name in {**first, **second})


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "--encoder timm/resnet10t.*--mask-ratio 0"),
        ({"mask_ratio": 0.5, "decoder_depth": 0}, "--encoder timm/resnet10t.*--mask-ratio 0"),
        ({"mask_ratio": 0, "encoder_width": 64}, "--encoder-width"),
        ({"mask_ratio": 0, "image_size": 60}, "--image-size 60"),
    ],
)
def test_what_only_a_plain_vit_can_do_is_refused(given, named):
    config = PretrainConfig(**{"stores": (), "run": "run", "image_size": 64, "encoder": "timm/resnet10t", **given})
    with pytest.raises(InputError, match=named):
        build_student(config, 16, 10, 3, on="meta")
