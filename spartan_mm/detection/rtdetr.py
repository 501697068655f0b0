"""RT-DETR: backbone, hybrid encoder, query selection, decoder and head wired together.

Source: `DETRs Beat YOLOs on Real-time Object Detection <https://arxiv.org/abs/2304.08069>`_.
"""
from typing import Any

import torch
from mmdet.models.detectors.base_detr import DetectionTransformer
from mmdet.registry import MODELS
from mmdet.structures import OptSampleList, SampleList
from torch import Tensor, nn

from ..backbones.pyramid import check_strides
from .denoising import DenoisingGenerator
from .forms import done_once, fold_batch_norms
from .shape_cache import cached_by_shape
from .targets import gather_targets


@cached_by_shape
def make_anchors(spatial_shapes: tuple[tuple[int, int], ...], base_size: float = 0.05,
                 device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """One square box a token, from which the encoder's boxes start.

    Level l has boxes of side `base_size` * 2^l, centred on their cells.

    Args:
        spatial_shapes: (H, W) of each map.
        base_size: Side of the finest level's boxes, as a fraction of the image.
        device: Where the result lies.

    NOTE: The official code has infinity in place of 1e4; either way the sigmoid is 1, and the
    decoder sees the same. Not every runtime goes on well with infinity.

    Returns:
        Logits (L, 4) of (cx, cy, w, h), 1e4 for invalid boxes, and (L, 1), True for valid ones, all
        of whose numbers lie within 0.01 and 0.99.
    """
    anchors = []
    for level, (height, width) in enumerate(spatial_shapes):
        rows = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
        columns = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
        center_y, center_x = torch.meshgrid(rows, columns, indexing='ij')
        side = torch.full_like(center_x, base_size * 2 ** level)
        anchors.append(torch.stack([center_x, center_y, side, side], -1).flatten(0, 1))
    anchors = torch.cat(anchors)
    # In a row of 50 cells, as of 800 pixels, the outer centres are 0.01 and 0.99 themselves, which
    # a runtime or a GPU may round to either side. No other centre is as near to them as the margin.
    margin = 1e-6
    valid = ((anchors > 0.01 + margin) & (anchors < 0.99 - margin)).all(-1, keepdim=True)
    return (anchors / (1 - anchors)).log().masked_fill(~valid, 1e4), valid


def with_in_channels(neck: dict, backbone: nn.Module) -> dict:
    """Complete a neck's config, of which `in_channels` may be left out or None.

    Args:
        neck: Config of the neck.
        backbone: Publishes the channels of its maps as a sequence `out_channels`, or doesn't.

    Raises:
        ValueError: `in_channels` is given and differs from what the backbone publishes, or from the
            number of its `out_indices`, or it is left out and the backbone publishes nothing.
    """
    published, given = getattr(backbone, 'out_channels', None), neck.get('in_channels')
    name = type(backbone).__name__
    if not isinstance(published, list | tuple):
        if given is None:
            raise ValueError(f'neck.in_channels is needed: {name} has no out_channels to take it '
                             'from')
        indices = getattr(backbone, 'out_indices', None)
        if isinstance(indices, list | tuple) and len(indices) != len(given):
            raise ValueError(f'neck.in_channels={tuple(given)}, but {name} gives as many maps as '
                             f'out_indices={tuple(indices)} says: {len(indices)}; make the two '
                             'equally long')
        return neck
    if given is not None and tuple(given) != tuple(published):
        raise ValueError(f'neck.in_channels={tuple(given)}, but the maps of {name} have '
                         f'out_channels={tuple(published)}; leave neck.in_channels out, or set the '
                         "backbone's out_indices accordingly")
    return dict(neck, in_channels=tuple(published))


def _check_samples(images: Tensor, samples: OptSampleList) -> None:
    """Refuse a batch without ground truth before it changes running statistics."""
    if samples is None or len(samples) != len(images) or not all(
            'gt_instances' in sample for sample in samples):
        found = 'none' if samples is None else f'{len(samples)} for {len(images)} images'
        raise ValueError('RTDETR in training mode makes queries of the ground truth: it needs a '
                         f'data sample with gt_instances for each image, and there are {found}; '
                         'call model.eval() to run it on images alone')


DEPLOYED = ('RTDETR is in deploy form, whose folded weights cannot be trained: build it anew from '
            'its config and load the checkpoint of the training')


@MODELS.register_module()
class RTDETR(DetectionTransformer):
    """Real-time detection transformer on any backbone.

    NOTE: mmdet's scheme is pre_transformer, encoder, pre_decoder, decoder. The neck is the encoder
    here: it has all the attention before the decoder. There is no padding mask: images of a batch
    may differ in `img_shape`, but their padding is seen.

    Args:
        backbone: Gives the maps that `neck` fuses.
        neck: Usually :class:`HybridEncoder`. Its `in_channels` may be left out where the backbone
            publishes `out_channels`.
        decoder: Of type :class:`RTDETRDecoder` if it names none.
        bbox_head: Usually :class:`RTDETRHead`.
        num_queries: Queries; an image with fewer tokens gets as many as it has.
        dn_cfg: Arguments of :class:`DenoisingGenerator`, without `num_classes` and `embed_dims`.
        train_cfg: `assigner`, handed to the head.
        test_cfg: `max_per_img`, handed to the head.
        data_preprocessor: See mmdet's DetDataPreprocessor.
        init_cfg: See mmengine's BaseModule.
        distillation: What a teacher adds to the training, and to nothing else, see
            :mod:`.distillation`.

    Raises:
        ValueError: Decoder and head differ in `embed_dims`, neck and decoder in channels, or neck
            and backbone, see :func:`with_in_channels`; or the backbone's maps are no pyramid.
    """

    deploy = False

    def __init__(self, backbone: dict, neck: dict, decoder: dict, bbox_head: dict,
                 num_queries: int = 300, dn_cfg: dict | None = None,
                 train_cfg: dict | None = None, test_cfg: dict | None = None,
                 data_preprocessor: dict | None = None, init_cfg: dict | None = None,
                 distillation: dict | None = None):
        self.dn_cfg = dict(dn_cfg or {})
        bbox_head = dict(bbox_head, num_pred_layer=decoder.get('num_layers', 6) + 1)
        super().__init__(
            backbone=backbone,
            # Built by the parent in its turn, when the backbone can be asked for its channels.
            neck=dict(type=self._build_neck, config=neck),
            decoder=dict(decoder), bbox_head=bbox_head, num_queries=num_queries,
            train_cfg=train_cfg, test_cfg=test_cfg, data_preprocessor=data_preprocessor,
            init_cfg=init_cfg)
        self.distillation = distillation and MODELS.build(
            distillation, default_args=dict(student=self))

    def _build_neck(self, config: dict) -> nn.Module:
        """Build the neck for the maps of the backbone."""
        check_strides(self.backbone)
        return MODELS.build(with_in_channels(config, self.backbone))

    def _init_layers(self) -> None:
        """Build what lies between neck and head."""
        if hasattr(self.neck, 'embed_dims') and hasattr(self.neck, 'in_channels'):
            given = tuple(self.decoder.get('in_channels', [256] * 3))
            maps = (self.neck.embed_dims,) * len(self.neck.in_channels)
            if given != maps:
                raise ValueError(f'decoder.in_channels={given}, but the maps of the neck have '
                                 f'channels {maps}: set decoder.in_channels to these')
        self.decoder = MODELS.build(dict(type='RTDETRDecoder') | self.decoder)
        self.embed_dims = self.decoder.embed_dims
        if self.bbox_head.embed_dims != self.embed_dims:
            raise ValueError(f'bbox_head.embed_dims={self.bbox_head.embed_dims} must be '
                             f'decoder.embed_dims={self.embed_dims}')
        self.memory_trans_fc = nn.Linear(self.embed_dims, self.embed_dims)
        self.memory_trans_norm = nn.LayerNorm(self.embed_dims)
        self.dn_query_generator = DenoisingGenerator(
            num_classes=self.bbox_head.num_classes, embed_dims=self.embed_dims, **self.dn_cfg)

    def init_weights(self) -> None:
        """Xavier for the encoder's output; see the parts for theirs."""
        nn.init.xavier_uniform_(self.memory_trans_fc.weight)
        super().init_weights()

    def extract_feat(self, batch_inputs: Tensor) -> tuple[Tensor, ...]:
        """Maps (N, C, H_i, W_i) of images (N, 3, H, W), which take the type of the weights."""
        return super().extract_feat(batch_inputs.to(self.memory_trans_fc.weight.dtype))

    def forward_transformer(self, img_feats: tuple[Tensor, ...],
                            batch_data_samples: OptSampleList = None) -> dict:
        """Select queries and run the decoder.

        Args:
            img_feats: The neck's maps (N, C, H_i, W_i).
            batch_data_samples: The images' `gt_instances`, needed in training.

        Returns:
            Arguments of the head's `forward`, in training also of its `loss`.
        """
        encoder_inputs, decoder_inputs = self.pre_transformer(img_feats)
        selected, head_inputs = self.pre_decoder(
            **self.forward_encoder(**encoder_inputs), batch_data_samples=batch_data_samples)
        head_inputs.update(self.forward_decoder(**decoder_inputs, **selected))
        return head_inputs

    def pre_transformer(self, img_feats: tuple[Tensor, ...]) -> tuple[dict, dict]:
        """Project the maps and lay them out as the tokens that the decoder attends to."""
        memory, spatial_shapes = self.decoder.embed(img_feats)
        tokens = dict(memory=memory, spatial_shapes=spatial_shapes)
        return tokens, tokens

    def forward_encoder(self, memory: Tensor,
                        spatial_shapes: tuple[tuple[int, int], ...]) -> dict:
        """Score every token as a possible object.

        Args:
            memory: (N, L, C).
            spatial_shapes: (H, W) of each map.

        Returns:
            The memory, its anchors (L, 4) as logits and their validity (L, 1), the tokens (N, L, C)
            and their class logits (N, L, classes).
        """
        anchors, valid = make_anchors(spatial_shapes, device=memory.device)
        tokens, logits = self.score_tokens(memory, valid)
        return dict(memory=memory, anchors=anchors, valid=valid, tokens=tokens, logits=logits)

    def score_tokens(self, memory: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (..., C) made of memory (..., C), and their class logits (..., classes)."""
        tokens = self.memory_trans_norm(self.memory_trans_fc(memory * valid))
        # The last branches of the head are the encoder's.
        return tokens, self.bbox_head.cls_branches[-1](tokens).float()

    def pre_decoder(self, memory: Tensor, anchors: Tensor, valid: Tensor, tokens: Tensor,
                    logits: Tensor, batch_data_samples: OptSampleList = None) -> tuple[dict, dict]:
        """Select the most promising tokens as queries and put the denoising queries before them.

        NOTE: The official code predicts the boxes of all tokens, and its backward pass runs through
        all of them, although that of the others is zero. Here only the selected ones have boxes,
        and in training they are made and scored once more, which is all that the gradient sees.

        Args:
            memory: (N, L, C), and what :meth:`forward_encoder` made of it.
            anchors: (L, 4).
            valid: (L, 1).
            tokens: (N, L, C).
            logits: (N, L, classes).
            batch_data_samples: The images' `gt_instances`, needed in training.

        Returns:
            Arguments of the decoder (query, reference, attn_mask), and, in training, of the loss
            (encoder outputs of the selected tokens, denoising part, ground truth).

        """
        num_queries = min(self.num_queries, tokens.shape[1])
        index = logits.amax(-1).topk(num_queries, dim=1).indices  # (N, Q)

        def select(values: Tensor) -> Tensor:
            return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))

        if self.training:
            query, logits = self.score_tokens(select(memory), valid[index])
        else:
            query = select(tokens)
        reference = self.bbox_head.reg_branches[-1](query).float() + anchors[index]
        # The decoder doesn't train the encoder through its queries, only through the memory.
        decoder_inputs = dict(query=query.detach(), reference=reference.detach())
        if not self.training:
            return decoder_inputs, {}

        targets = gather_targets(batch_data_samples)
        denoising = self.dn_query_generator(targets, num_queries)
        if denoising is not None:
            decoder_inputs = dict(
                query=torch.cat([denoising.content.to(query.dtype), decoder_inputs['query']], 1),
                reference=torch.cat([denoising.reference, decoder_inputs['reference']], 1),
                attn_mask=denoising.attn_mask)
        return decoder_inputs, dict(enc_logits=logits, enc_boxes=reference.sigmoid(),
                                    denoising=denoising, targets=targets)

    def forward_decoder(self, query: Tensor, memory: Tensor, reference: Tensor,
                        spatial_shapes: tuple[tuple[int, int], ...],
                        attn_mask: Tensor | None = None) -> dict:
        """Run the decoder, see :meth:`RTDETRDecoder.forward`."""
        return self.decoder(query, memory, reference, spatial_shapes, attn_mask=attn_mask,
                            **self.bbox_head.box_branches())._asdict()

    def loss(self, batch_inputs: Tensor, batch_data_samples: SampleList) -> dict[str, Tensor]:
        """Losses of images (N, 3, H, W), see :meth:`RTDETRHead.loss_by_feat`.

        Raises:
            ValueError: There is not a sample with ground truth for each image.
            RuntimeError: The model is in eval mode, where queries and layers are left out, or in
                deploy form.
        """
        if self.deploy:
            raise RuntimeError(DEPLOYED)
        if not self.training:
            raise RuntimeError("RTDETR computes losses in training mode only; call model.train() "
                               'before forward(mode="loss")')
        _check_samples(batch_inputs, batch_data_samples)
        if self.distillation:
            return self.distillation(self, batch_inputs, batch_data_samples)
        return super().loss(batch_inputs, batch_data_samples)

    def _forward(self, batch_inputs: Tensor, batch_data_samples: OptSampleList = None
                 ) -> tuple[list[Tensor], list[Tensor]]:
        """Logits and boxes, see :meth:`RTDETRHead.forward`; training makes queries of the samples.

        Raises:
            ValueError: The model is in training mode, and there is not a sample with ground truth
                for each image.
        """
        if self.training:
            _check_samples(batch_inputs, batch_data_samples)
        if torch.jit.is_tracing():
            # NOTE: A trace holds for the size that it was made at, which decides the anchors; this
            # step fails at any other instead of giving wrong boxes. torch.export takes all sizes.
            batch_inputs = batch_inputs.expand(-1, *map(int, batch_inputs.shape[1:]))
        return super()._forward(batch_inputs, batch_data_samples)

    def infer(self, batch_inputs: Tensor) -> tuple[Tensor, Tensor]:
        """What `predict` makes its detections of: tensors from tensors, and nothing else.

        Args:
            batch_inputs: (N, 3, H, W).

        Returns:
            Class logits (N, Q, classes) and boxes (N, Q, 4) (cx, cy, w, h; 0 to 1), float32.
        """
        logits, boxes = self._forward(batch_inputs)
        return logits[-1], boxes[-1]

    def predict(self, batch_inputs: Tensor, batch_data_samples: SampleList,
                rescale: bool = True) -> SampleList:
        """Detections of a batch.

        Args:
            batch_inputs: (N, 3, H, W).
            batch_data_samples: The images' meta information.
            rescale: Whether boxes refer to the original images instead of the network's input.

        Returns:
            The samples with `pred_instances`, see :meth:`RTDETRHead.predict_by_feat`.
        """
        metas = [sample.metainfo for sample in batch_data_samples]
        results = self.bbox_head.predict_by_feat(*self.infer(batch_inputs), metas, rescale)
        return self.add_pred_to_datasample(batch_data_samples, results)

    @done_once
    def switch_to_deploy(self) -> None:
        """Take the form that only predicts: fewer layers and operations, the same outputs.

        BatchNorms are folded, parallel branches fused, and what no prediction comes from is
        dropped: decoder layers after `eval_idx`, other layers' class branches, denoising and
        distillation. A backbone (or neck) with a method of this name takes its own such form. Doing
        it again changes nothing.
        """
        for part in (self.backbone, self.neck):
            if hasattr(part, 'switch_to_deploy'):
                part.switch_to_deploy()
            else:
                fold_batch_norms(part)
        self.decoder.switch_to_deploy()
        self.bbox_head.switch_to_deploy(self.decoder.eval_idx)
        del self.dn_query_generator
        self.distillation = None
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> 'RTDETR':
        """Switch between training and evaluation.

        Raises:
            RuntimeError: Training is asked of the deploy form.
        """
        if mode and self.deploy:
            raise RuntimeError(DEPLOYED)
        return super().train(mode)

    def compile(self, mode: str | None = None, dynamic: bool | None = None, **kwargs: Any) -> None:
        """Compile, in place, what makes tensors from tensors; everything else runs as it is.

        That is `infer` as one graph, and for training backbone, neck and decoder, with matching
        and losses between and after them left alone.

        NOTE: `mode` is `infer`'s. CUDA graphs ('reduce-overhead', 'max-autotune') hold for one
        size, which training changes all the time: it then has the default mode.

        Args:
            mode: See torch.compile.
            dynamic: See torch.compile; None compiles a second time, for all sizes, once a second
                size comes.
            kwargs: What else torch.compile takes.
        """
        infer = type(self).infer.__get__(self)
        self.infer = torch.compile(infer, fullgraph=True, mode=mode, dynamic=dynamic, **kwargs)
        if mode in ('reduce-overhead', 'max-autotune'):
            mode = None
        for part in (self.backbone, self.neck, self.decoder):
            part.compile(mode=mode, dynamic=dynamic, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Load what a checkpoint has, whatever its training was distilled from, if anything."""
        part = f'{prefix}distillation.'
        own = self.distillation.state_dict(prefix=part) if self.distillation else {}
        for name in [name for name in state_dict if name.startswith(part) and name not in own]:
            del state_dict[name]
        for name, value in own.items():
            state_dict.setdefault(name, value)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict:
        # The compiled form would go on to run the weights of the model that it was made from.
        return {name: value for name, value in super().__getstate__().items() if name != 'infer'}
