"Anchors, matching and sampling against torchvision; and the one case where we differ on purpose."
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, Matcher as PeerMatcher
from torchvision.models.detection.anchor_utils import AnchorGenerator as TorchvisionAnchors
from torchvision.models.detection.image_list import ImageList

from helpers import never_waits
from maskrcnn_course.anchors import (AnchorGenerator, Matcher, assign_targets_to_anchors, balanced_sample,
                                     cell_anchors, grid_anchors, random_subset)
from maskrcnn_course.boxes import box_iou

BACKGROUND, BETWEEN = Matcher.BELOW_LOW_THRESHOLD, Matcher.BETWEEN_THRESHOLDS
PAPER = Matcher(.7, .3, allow_low_quality_matches=True)

settings.register_profile("quick", max_examples=150, deadline=None)
settings.load_profile("quick")

sizes = st.lists(st.integers(4, 600), min_size=1, max_size=4).map(tuple)
ratios = st.lists(st.sampled_from([.25, .5, 1., 1.5, 2., 3.]), min_size=1, max_size=4).map(tuple)


@given(sizes, ratios)
def test_anchors_of_a_cell_are_torchvisions(sizes, ratios):
    assert torch.equal(cell_anchors(sizes, ratios), TorchvisionAnchors().generate_anchors(sizes, ratios))


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 40), st.integers(1, 40))
def test_the_grid_goes_row_by_row(rows, columns, down, right):
    cell = cell_anchors((8, 16), (.5, 2.))
    expected = [cell + tensor([c * right, r * down] * 2) for r in range(rows) for c in range(columns)]
    assert torch.equal(grid_anchors(cell, (rows, columns), (down, right)), torch.cat(expected))


@given(st.integers(64, 400), st.integers(64, 400), st.lists(st.tuples(sizes, ratios), min_size=3, max_size=3))
def test_anchors_of_a_pyramid_are_torchvisions(height, width, levels):
    sizes, ratios = (tuple(x) for x in zip(*levels))
    features = [torch.zeros(2, 1, -(-height // s), -(-width // s)) for s in (8, 16, 32)]
    ours, theirs = AnchorGenerator(sizes, ratios), TorchvisionAnchors(sizes, ratios)
    peer = theirs(ImageList(torch.zeros(2, 3, height, width), [(height, width)] * 2), features)
    assert torch.equal(torch.cat(ours((height, width), features)), peer[0])
    assert ours.num_anchors_per_location() == theirs.num_anchors_per_location()


@pytest.mark.parametrize("given_type,kept", [(torch.bfloat16, torch.float32), (torch.float16, torch.float32),
                                             (torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_anchors_do_not_lose_digits_to_half_precision(given_type, kept):
    generator = AnchorGenerator(((512,),), ((.5, 1., 2.),))
    anchors = generator((1088, 1344), [torch.zeros(1, 1, 17, 21, dtype=given_type)])[0]
    assert anchors.dtype == kept
    assert torch.equal(anchors.float(), generator((1088, 1344), [torch.zeros(1, 1, 17, 21)])[0])


def test_levels_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="2 levels, aspect ratios for 5"):
        AnchorGenerator(sizes=((8,), (16,)))
    with pytest.raises(ValueError, match="4 feature maps for the anchors of 5 levels"):
        AnchorGenerator()((64, 64), [torch.zeros(1, 1, 4, 4)] * 4)


@st.composite
def iou_tables(draw):
    value = st.sampled_from([0., 0., .1, .25, .3, .5, .7, .9, 1.]) | st.floats(0, 1, width=32)
    boxes, n = draw(st.integers(1, 6)), draw(st.integers(1, 30))
    row = st.lists(value, min_size=n, max_size=n)
    return tensor(draw(st.lists(row, min_size=boxes, max_size=boxes)), dtype=torch.float32)


def real(iou): return torch.ones(len(iou), dtype=torch.bool)


thresholds = st.sampled_from([(.7, .3), (.5, .5), (.5, .4), (1., 0.)])


@given(iou_tables(), thresholds)
def test_matching_is_torchvisions(iou, limits):
    assert torch.equal(Matcher(*limits)(iou, real(iou)), PeerMatcher(*limits)(iou))
    touched = iou[iou.amax(1) > 0]  # with a box that overlaps nothing the two differ, see below
    if len(touched):
        ours, theirs = Matcher(*limits, True), PeerMatcher(*limits, True)
        assert torch.equal(ours(touched, real(touched)), theirs(touched))


def test_names_and_codes_are_torchvisions():
    for name in ("BELOW_LOW_THRESHOLD", "BETWEEN_THRESHOLDS"):
        assert getattr(Matcher, name) == getattr(PeerMatcher, name)
    theirs = vars(PeerMatcher(.7, .3, allow_low_quality_matches=True))
    assert vars(PAPER).items() <= theirs.items()


@given(iou_tables(), thresholds, st.booleans())
def test_padding_and_boxes_that_overlap_nothing_change_nothing(iou, limits, low_quality):
    matcher, n = Matcher(*limits, low_quality), len(iou)
    matched = matcher(iou, real(iou))
    for padding, is_real in ((torch.zeros_like(iou), True), (torch.ones_like(iou), False), (iou, False)):
        valid = torch.cat([real(iou), torch.full((n,), is_real)])
        assert torch.equal(matcher(torch.cat([iou, padding]), valid), matched)
    assert (Matcher(.7, .3, low_quality)(iou, ~real(iou)) == BACKGROUND).all()
    assert torch.equal(matcher(iou.expand(3, -1, -1), real(iou).expand(3, -1)), matched.expand(3, -1))


def test_a_box_that_overlaps_nothing_gets_no_anchor():
    iou = tensor([[.8, 0, .1, 0, .5], [0, 0, 0, 0, 0]])
    assert PAPER(iou, real(iou)).tolist() == [0, BACKGROUND, BACKGROUND, BACKGROUND, BETWEEN]
    assert PeerMatcher(.7, .3, True)(iou).tolist() == [0] * 5  # torchvision's makes objects of all


def test_five_anchors_and_two_boxes():
    boxes = tensor([[0., 0, 10, 10], [20, 0, 30, 20]]).expand(3, 2, 4)
    anchors = tensor([[0., 0, 10, 8], [4, 0, 14, 10], [8, 0, 18, 10], [20, 0, 30, 10], [24, 6, 34, 16]])
    valid = tensor([[True, True], [True, False], [False, False]])
    labels, matched = assign_targets_to_anchors(anchors, boxes, valid, PAPER)
    assert labels.tolist() == [[1, -1, 0, 1, 0], [1, -1, 0, 0, 0], [0] * 5]
    assert torch.equal(matched[0, [0, 3]], boxes[0])
    labels, _ = assign_targets_to_anchors(anchors, boxes, valid, Matcher(.5, .5))  # another matcher
    assert labels.tolist() == [[1, 0, 0, 1, 0], [1, 0, 0, 0, 0], [0] * 5]


@given(st.integers(0, 2**31), st.integers(0, 6))
def test_targets_are_those_of_torchvisions_rpn(seed, n):
    from torchvision.models.detection.rpn import RegionProposalNetwork
    g = torch.Generator().manual_seed(seed)
    maps = [torch.zeros(1, 1, 8, 12), torch.zeros(1, 1, 4, 6)]
    anchors = torch.cat(AnchorGenerator(((16,), (32,)), ((.5, 1., 2.),) * 2)((64, 96), maps))
    corner = torch.rand(n, 2, generator=g) * 50
    boxes = torch.cat([corner, corner + 5 + torch.rand(n, 2, generator=g) * 40], 1)
    rpn = RegionProposalNetwork(None, None, .7, .3, 256, .5, {}, {}, .7)
    peer_labels, peer_boxes = rpn.assign_targets_to_anchors([anchors], [{"boxes": boxes}])
    padded, valid = torch.cat([boxes, torch.zeros(7 - n, 4)])[None], torch.arange(7)[None] < n
    labels, matched = assign_targets_to_anchors(anchors, padded, valid, PAPER)
    assert torch.equal(labels[0], peer_labels[0])
    assert torch.equal(matched[0][labels[0] == 1], peer_boxes[0][labels[0] == 1])


@given(st.integers(0, 2**31), st.integers(1, 80), st.integers(1, 100), st.sampled_from([0., .25, .5, 1.]))
def test_samples_have_the_size_of_torchvisions(seed, n, size, share):
    g = torch.Generator().manual_seed(seed)
    labels = (torch.rand(4, n, generator=g) < torch.rand(4, 1, generator=g)).float()
    labels -= (torch.rand(4, n, generator=g) < .3).float()
    positive, negative = balanced_sample(labels >= 1, labels == 0, size, share, g)
    for ours, theirs in zip((positive, negative), BalancedPositiveNegativeSampler(size, share)(list(labels))):
        assert torch.equal(ours.sum(1), torch.stack(theirs).sum(1))
    assert (labels[positive] == 1).all() and (labels[negative] == 0).all()


def test_every_candidate_has_the_same_chance():
    candidates = torch.arange(10).expand(20_000, 10) < 8
    taken = random_subset(candidates, torch.full((20_000,), 3), 3, torch.Generator().manual_seed(0)).float()
    torch.testing.assert_close(taken.mean(0), candidates[0] * 3 / 8, atol=.015, rtol=0)
    together = (taken.T @ taken / len(taken))[0, 1:8]  # and so has every pair
    torch.testing.assert_close(together, torch.full((7,), 3 / 8 * 2 / 7), atol=.015, rtol=0)


def test_a_seed_gives_the_same_choice_again():
    candidates, count = torch.rand(4, 50) < .5, torch.tensor([5, 0, 50, 9])
    def draw(seed): return random_subset(candidates, count, 50, torch.Generator().manual_seed(seed))
    first, again, other = draw(1), draw(1), draw(2)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first.sum(1), torch.minimum(count, candidates.sum(1)))


def test_nothing_looks_at_a_number():
    [anchors] = AnchorGenerator(((8,),), ((1.,),))((32, 32), [torch.zeros(1, 1, 4, 4, device="meta")])
    boxes, valid = torch.rand(2, 3, 4, device="meta"), torch.ones(2, 3, device="meta") > 0
    labels, matched = assign_targets_to_anchors(anchors, boxes, valid, PAPER)
    positive, negative = balanced_sample(labels == 1, labels == 0, 8, .5)
    assert labels.shape == positive.shape == negative.shape == (2, 16) and matched.shape == (2, 16, 4)


def test_without_a_box_all_is_background():
    iou, valid = torch.zeros(2, 0, 5), torch.zeros(2, 0, dtype=torch.bool)
    assert torch.equal(PAPER(iou, valid), torch.full((2, 5), BACKGROUND))


@pytest.mark.gpu
def test_targets_and_samples_do_not_wait_for_the_gpu(gpu):
    generator, maps = AnchorGenerator(((8,),), ((1.,),)), [torch.zeros(1, 1, 4, 4, device=gpu)]
    generator((32, 32), maps)  # the first time the cells move there
    boxes = torch.rand(2, 3, 4, device=gpu).cumsum(-1) * 8
    valid = torch.ones(2, 3, dtype=torch.bool, device=gpu)
    with never_waits(gpu):
        anchors = torch.cat(generator((32, 32), maps))
        labels, _ = assign_targets_to_anchors(anchors, boxes, valid, PAPER)
        balanced_sample(labels == 1, labels == 0, 8, .5)
    on_cpu, _ = assign_targets_to_anchors(anchors.cpu(), boxes.cpu(), valid.cpu(), PAPER)
    assert torch.equal(labels.cpu(), on_cpu)


def test_iou_of_anchors_with_themselves_matches_all():
    maps = [torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 2, 2)]
    anchors = torch.cat(AnchorGenerator(((8,), (16,)), ((1.,),) * 2)((32, 32), maps))
    matched = Matcher(.7, .3)(box_iou(anchors, anchors), real(anchors))
    assert torch.equal(matched, torch.arange(len(anchors)))
