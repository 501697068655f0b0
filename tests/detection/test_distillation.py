"""What teachers add to a training, and to nothing else."""
import copy
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from spartan_mm.cli import main
from spartan_mm.detection import DistillationWeightHook, FeatureDistillation
from spartan_mm.detection.distributions import (
    distillation_loss,
    moved_distributions,
    refined_boxes,
)
from spartan_mm.engine.checkpoint_hook import ResumableCheckpointHook
from spartan_mm.errors import CheckpointError, UsageError
from spartan_mm.weights.converters.convert import read_source
from spartan_mm.weights.forms import switch_to_deploy
from spartan_mm.weights.loading import load_all_weights
from spartan_mm.weights.publish import publish
from spartan_mm.weights.safe_load import read_checkpoint

DISTRIBUTIONS = {'decoder.type': 'DFINEDecoder', 'decoder.gate': False,
                 'decoder.project_values': True, 'bbox_head.type': 'DFINEHead'}
TEACHER = {'num_queries': 13, 'backbone.arch.channels': (8, 16, 24, 40)}
CLASSES = tuple('abcde')
KINDS = pytest.mark.parametrize('changes', [{}, DISTRIBUTIONS], ids=['v1', 'FDR'])


@pytest.fixture
def write_teacher(configure, build, tmp_path):
    """Writes a teacher, and says where to find it."""
    def write(name='teacher', **changes):
        configure(**TEACHER, **changes).dump(tmp_path / f'{name}.py')
        teacher = build(**TEACHER, **changes)
        for branch in teacher.bbox_head.reg_branches:
            torch.nn.init.normal_(branch[-1].weight, std=0.1)
        path = tmp_path / f'{name}.pth'
        torch.save(dict(meta=dict(dataset_meta=dict(classes=CLASSES)),
                        state_dict=teacher.state_dict()), path)
        return dict(config=str(tmp_path / f'{name}.py'), checkpoint=str(path))
    return write


@pytest.fixture
def vit(tmp_path):
    """Writes a small ViT's weights, and says where to find them; and the ViT."""
    import timm
    teacher = timm.create_model('test_vit', dynamic_img_size=True).eval()
    path = tmp_path / 'vit.pth'
    torch.save(teacher.state_dict(), path)
    return dict(model_name='test_vit', checkpoint=str(path)), teacher


def distilled(kind='DetectorDistillation', **settings):
    """The one line of a config."""
    return dict(distillation=dict(type=kind, **settings))


def taught_features(vit, **settings):
    """The one line with a ViT of 64 channels."""
    return distilled('FeatureDistillation', teacher=vit[0], **dict(channels=64) | settings)


class TestMovedDistributions:

    def test_nothing_moves_between_equal_boxes(self):
        corners, base = torch.randn(3, 4 * 33), torch.rand(3, 4) / 2 + 0.2
        moved = moved_distributions(corners, base, 4., base, 32, 4., 5.)
        torch.testing.assert_close((moved / 5).unflatten(-1, (4, -1)).exp(),
                                   (corners.unflatten(-1, (4, -1)) / 5).softmax(-1),
                                   rtol=1e-4, atol=1e-5)

    def test_edges_stay_in_place_on_average(self):
        corners = torch.randn(3, 4 * 17)
        # No edge in the outermost bins, from where the other boxes' bins are out of reach.
        corners.unflatten(-1, (4, -1))[..., [0, -1]] = -30.
        base = torch.tensor([[0.5, 0.4, 0.3, 0.2]]).expand(3, -1)
        other = base + torch.tensor([0.01, -0.02, 0.02, 0.03])
        moved = moved_distributions(corners, base, 4., other, 32, 3., 1.)
        assert moved.shape == (3, 4 * 33)
        torch.testing.assert_close(refined_boxes(other, moved, 3.),
                                   refined_boxes(base, corners, 4.))

    def test_places_out_of_reach_go_to_the_ends(self):
        corners = torch.zeros(1, 4, 33)
        corners[..., -1] = 50.  # outwards by the whole side
        base = torch.tensor([[0.5, 0.5, 0.8, 0.8]])
        moved = moved_distributions(corners.flatten(1), base, 4., base / 8, 32, 4., 1.)
        assert (moved.unflatten(-1, (4, -1)).argmax(-1) == 32).all()


class TestLosses:

    @KINDS
    def test_by_plain_formula(self, changes, build, write_teacher, make_samples):
        teacher = write_teacher(**changes)
        model = build(**changes, **distilled(teacher=teacher, loss_weight=0.5)).train()
        images, samples = torch.rand(2, 3, 64, 48), make_samples([2, 3], 64, 48)
        losses = model(images, samples, mode='loss')

        plain = build(**TEACHER, **changes)
        plain.load_state_dict(torch.load(teacher['checkpoint'])['state_dict'])
        plain.eval()
        with torch.no_grad():
            logits, boxes = plain.infer(images)
        head, scores = model.bbox_head, logits.sigmoid()
        weight = scores.amax(-1)
        taught, seen = model.distillation.teach(model, images)
        assert taught['query'].shape[1] == 13
        torch.testing.assert_close(seen['logits'], logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen['boxes'], boxes, rtol=1e-4, atol=1e-5)

        tokens, _ = model.pre_transformer(model.extract_feat(images))
        decoded = model.forward_decoder(taught['query'], reference=taught['reference'], **tokens)
        own_logits, own_boxes = head(**decoded)
        for layer, prefix in enumerate(('d0.', '')):
            expected = dict(
                loss_cls=F.binary_cross_entropy_with_logits(
                    own_logits[layer], scores, reduction='none').sum(-1),
                loss_bbox=5 * (own_boxes[layer] - boxes).abs().sum(-1))
            if changes:
                target = moved_distributions(seen['corners'], seen['base'], 4.,
                                             decoded['base_boxes'], 32, 4., 5.)
                expected['loss_ddf'] = 1.5 * distillation_loss(
                    decoded['corners'][layer], target, 5.).mean(-1)
            for name, terms in expected.items():
                total = 0.5 * (weight * terms).sum() / weight.sum().clamp(min=1)
                torch.testing.assert_close(losses[f'{prefix}distill_{name}'], total, rtol=1e-3,
                                           atol=1e-5)
            assert losses[f'{prefix}distill_loss_iou'] > 0

    @KINDS
    def test_others_do_not_change(self, changes, build, write_teacher, make_samples):
        model = build(**changes, **distilled(teacher=write_teacher(**changes))).train()
        images, samples = torch.rand(2, 3, 64, 64), make_samples([2, 0])
        torch.manual_seed(1)
        losses = model(images, samples, mode='loss')
        model.distillation = None
        torch.manual_seed(1)
        expected = model(images, samples, mode='loss')
        torch.testing.assert_close({name: losses[name] for name in expected}, expected)

    def test_without_denoising_and_objects(self, build, write_teacher, make_samples):
        model = build(**{'dn_cfg.num_queries': 0}, **distilled(teacher=write_teacher())).train()
        losses = model(torch.rand(2, 3, 64, 64), make_samples([0, 0]), mode='loss')
        sum(losses.values()).backward()
        assert all(value.isfinite() for value in losses.values())
        assert not [name for name, parameter in model.named_parameters()
                    if parameter.requires_grad and parameter.grad is None]

    def test_in_mixed_precision(self, build, write_teacher, make_samples):
        model = build(**DISTRIBUTIONS, **distilled(teacher=write_teacher(**DISTRIBUTIONS))).train()
        with torch.autocast('cpu', torch.bfloat16):
            losses = model(torch.rand(2, 3, 64, 64), make_samples([2, 3]), mode='loss')
        sum(losses.values()).backward()
        assert {value.dtype for name, value in losses.items() if 'distill' in name} == {
            torch.float32}

    def test_the_teacher_sees_what_it_was_trained_with(self, build, write_teacher):
        """The same picture as the student, by its own mean and standard deviation."""
        teacher = write_teacher(**{'data_preprocessor.mean': [120.] * 3,
                                   'data_preprocessor.std': [60.] * 3})
        model = build(**distilled(teacher=teacher))
        pictures = torch.randint(0, 256, (1, 3, 64, 64)).float()
        plain = model.distillation.prepare(model)
        _, seen = model.distillation.teach(model, pictures / 255)
        torch.testing.assert_close(seen['logits'], plain.infer((pictures - 120) / 60)[0],
                                   rtol=1e-4, atol=1e-4)


class TestTeacher:

    def test_is_no_part_of_the_model(self, build, write_teacher, make_samples):
        plain = build()
        model = build(**distilled(teacher=write_teacher())).train()
        copied = copy.deepcopy(model)
        sum(model(torch.rand(1, 3, 64, 64), make_samples([2]), mode='loss').values()).backward()
        teacher = model.distillation.prepare(model)
        assert copied.distillation.prepare(copied) is teacher
        assert not teacher.training
        assert all(parameter.grad is None and not parameter.requires_grad
                   for parameter in teacher.parameters())
        assert model.state_dict().keys() == plain.state_dict().keys()
        assert len([*model.parameters()]) == len([*plain.parameters()])

    def test_draws_no_random_number(self, build, write_teacher):
        model = build(**distilled(teacher=write_teacher()))
        state = torch.get_rng_state()
        model.distillation.prepare(model)
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize('changes, message', [
        ({'decoder.embed_dims': 64, 'bbox_head.embed_dims': 64},
         'has decoder.embed_dims=64, but the model has 32'),
        ({'bbox_head.num_classes': 4}, 'has bbox_head.num_classes=4, but the model has 5'),
    ])
    def test_that_does_not_fit(self, changes, message, build, write_teacher):
        model = build(**distilled(teacher=write_teacher(**changes)))
        with pytest.raises(UsageError, match=message):
            model.distillation.prepare(model)

    def test_of_other_classes(self, build, write_teacher):
        model = build(**distilled(teacher=write_teacher()))
        model.distillation.prepare(model, CLASSES)
        with pytest.raises(UsageError, match="label 4 is 'x' in the one and 'e' in the other"):
            model.distillation.prepare(model, (*CLASSES[:4], 'x'))

    def test_of_another_architecture(self, build, write_teacher):
        teacher = write_teacher()
        teacher['config'] = write_teacher('other', **DISTRIBUTIONS)['config']
        model = build(**distilled(teacher=teacher))
        with pytest.raises(CheckpointError, match='does not fit'):
            model.distillation.prepare(model)

    def test_that_is_not_there(self, build):
        model = build(**distilled(teacher=dict(config='rtdetr_r50vd', checkpoint='none.pth')))
        with pytest.raises(FileNotFoundError, match=r"the teacher's checkpoint none\.pth does not"):
            model.distillation.prepare(model)

    def test_without_checkpoint(self, build):
        with pytest.raises(ValueError, match='teacher takes a checkpoint and a config'):
            build(**distilled(teacher=dict(config='rtdetr_r50vd')))


class TestFeatures:

    @pytest.mark.parametrize('size', [(64, 64), (96, 128)], ids=['square', 'not square'])
    def test_by_plain_formula(self, size, build, vit, make_samples):
        model = build(**taught_features(vit, loss_weight=3.)).train()
        model.data_preprocessor.std.fill_(128.)  # images are -1 to 1
        model.data_preprocessor.mean.fill_(127.)
        pixels, samples = torch.randint(0, 256, (2, 3, *size)).float(), make_samples([2, 0], *size)
        losses = model((pixels - 127) / 128, samples, mode='loss')

        config = vit[1].pretrained_cfg
        mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ('mean', 'std'))
        with torch.no_grad():
            tokens = vit[1].forward_features((F.avg_pool2d(pixels, 2) / 255 - mean) / std)
        tokens = tokens[:, vit[1].num_prefix_tokens:]
        found = []
        model.neck.aifi.register_forward_hook(lambda *args: found.append(args[-1]))
        model.extract_feat((pixels - 127) / 128)
        own = model.distillation.project(found[0].flatten(2).mT)
        cosine = (own * tokens).sum(-1) / own.norm(dim=-1) / tokens.norm(dim=-1)
        torch.testing.assert_close(losses['distill_loss'], 3 * (1 - cosine).mean(), rtol=1e-3,
                                   atol=1e-4)

    def test_the_linear_layer_alone_is_added(self, build, vit, make_samples):
        plain, model = build(), build(**taught_features(vit)).train()
        losses = model(torch.rand(2, 3, 64, 64), make_samples([0, 0]), mode='loss')
        sum(losses.values()).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert model.distillation.prepare(model).pos_embed.grad is None
        added = model.state_dict().keys() - plain.state_dict().keys()
        assert added == {'distillation.project.weight', 'distillation.project.bias'}
        # Either loads the other's.
        load_all_weights(plain, dict(state_dict=model.state_dict()), 'x')
        model.distillation.project.weight.data.fill_(7.)
        load_all_weights(model, dict(state_dict=plain.state_dict()), 'x')
        assert (model.distillation.project.weight == 7).all()
        assert not [key for key in switch_to_deploy(model).state_dict() if 'distill' in key]

    def test_in_mixed_precision(self, build, vit, make_samples):
        model = build(**taught_features(vit)).train()
        with torch.autocast('cpu', torch.bfloat16):
            losses = model(torch.rand(1, 3, 64, 64), make_samples([2]), mode='loss')
        assert losses['distill_loss'].dtype == torch.float32
        losses['distill_loss'].backward()

    @pytest.mark.parametrize('changes, settings, error, message', [
        ({'model_name': 'test_vitt'}, {}, UsageError, "has no model 'test_vitt'"),
        ({'model_name': 'resnet10t'}, {}, UsageError, 'resnet10t is no vision transformer'),
        ({'checkpoint': 'none.pth'}, {}, FileNotFoundError, r'checkpoint none\.pth does not exist'),
        ({'model_name': 'test_vit2'}, {}, CheckpointError, 'weights do not fit .*vit.pth'),
        ({}, {'channels': 32}, UsageError, 'has 64 channels.*set it to 64'),
    ])
    def test_that_does_not_fit(self, changes, settings, error, message, build, vit):
        model = build(**taught_features((vit[0] | changes, None), **settings))
        with pytest.raises(error, match=message):
            model.distillation.prepare(model)

    def test_needs_aifi(self):
        student = SimpleNamespace(neck=torch.nn.Identity())
        with pytest.raises(ValueError, match='the neck Identity has no AIFI'):
            FeatureDistillation(student, dict(model_name='test_vit'), 64)


class TestDistillationWeight:

    @pytest.mark.parametrize('share, factor', [
        (0.11, 1.), (0.118, 1.), (0.05, 0.1 * 0.95 / (0.05 * 0.9)), (0.2, 0.12 * 0.8 / 0.2 / 0.88),
        (0., 10.), (0.95, 0.1)])
    def test_factor(self, share, factor):
        assert DistillationWeightHook(0.11, 0.01).factor(share) == pytest.approx(factor)

    def test_takes_the_weight_to_the_wanted_share(self):
        """If all of AIFI's gradient grew with the weight."""
        hook, weight = DistillationWeightHook(0.11, 0.01), 5.

        def share():
            return weight * 0.004 / (weight * 0.004 + 1)
        weight *= hook.factor(share())
        assert share() == pytest.approx(0.1)

    def test_bounds(self):
        with pytest.raises(ValueError, match='must leave bounds within 0 and 1'):
            DistillationWeightHook(0.01, 0.01)


@pytest.mark.slow
class TestTraining:

    def test_resumes_exactly(self, user_project, vit, tmp_path, monkeypatch):
        """In the middle of an epoch, with a weight that changes; and what is published of it."""
        config, kept = tmp_path / 'taught.py', tmp_path / 'kept'
        kept.mkdir()
        config.write_text(f"""
_base_ = {str(user_project / 'user_detector.py')!r}
model = dict(distillation=dict(type='FeatureDistillation', teacher={vit[0]}, channels=64))
custom_hooks = [
    *_base_.custom_hooks, dict(type='ClassCountCheckHook'),
    dict(type='DistillationWeightHook', share=0.5, tolerance=0.01)]
val_cfg = val_dataloader = val_evaluator = None
""")
        monkeypatch.chdir(user_project)
        save_now = ResumableCheckpointHook.save_now

        def save_and_keep(hook, *args):
            done = save_now(hook, *args)
            shutil.copy(hook.last_ckpt, kept)
            return done
        monkeypatch.setattr(ResumableCheckpointHook, 'save_now', save_and_keep)

        def train(name, *words):
            assert main(['train', str(config), '--work-dir', str(tmp_path / name), '--seed', '3',
                         '--save-every', '1', *words]) == 0
            return read_checkpoint(tmp_path / name / 'epoch_2.pth')
        whole = train('whole')
        [middle] = kept.glob('epoch_1_iter_3.pth')
        assert read_checkpoint(middle)['distillation_weight']['steps'] == 1
        resumed = train('resumed', '--resume', str(middle))
        for part in ('state_dict', 'ema_state_dict', 'distillation_weight'):
            torch.testing.assert_close(resumed[part], whole[part], rtol=0, atol=0)
        assert whole['distillation_weight']['weight'] != 5

        published = read_checkpoint(publish(
            tmp_path / 'whole' / 'epoch_2.pth', tmp_path / 'published').safetensors)
        assert not [name for name in published['state_dict'] if 'distill' in name]
        assert 'distillation' not in published['meta']['config']['model']
        assert any('distillation.' in name for name in whole['state_dict'])
        source = read_source(tmp_path / 'whole' / 'epoch_2.pth')
        assert not [name for name in source.weights if 'distill' in name]

    def test_a_wrong_teacher_ends_it_before_it_begins(self, user_project, tmp_path, monkeypatch):
        config = tmp_path / 'taught.py'
        config.write_text(f"""
_base_ = {str(user_project / 'user_detector.py')!r}
model = dict(distillation=dict(
    type='DetectorDistillation', teacher=dict(config='rtdetr_r50vd', checkpoint='none.pth')))
custom_hooks = [dict(type='ClassCountCheckHook')]
""")
        monkeypatch.chdir(user_project)
        with pytest.raises(SystemExit, match=r"error: the teacher's checkpoint none\.pth does not"):
            main(['train', str(config), '--work-dir', str(tmp_path / 'run')])
        assert not [*tmp_path.rglob('epoch*.pth')]


class TestInference:

    def test_nothing_is_left(self, build, write_teacher):
        model = build(**distilled(teacher=write_teacher())).eval()
        plain = build().eval()
        plain.load_state_dict(model.state_dict())
        images = torch.rand(1, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(model.infer(images), plain.infer(images), rtol=0, atol=0)
            for each in (model, plain):
                each.switch_to_deploy()
            torch.testing.assert_close(model.infer(images), plain.infer(images), rtol=0, atol=0)
        assert model.state_dict().keys() == plain.state_dict().keys()
