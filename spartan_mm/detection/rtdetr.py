"""RT-DETR: backbone, hybrid encoder, query selection, decoder and head wired together.

Source: `DETRs Beat YOLOs on Real-time Object Detection <https://arxiv.org/abs/2304.08069>`_.
"""
import copy
from collections.abc import Sequence

import torch
from mmdet.models.detectors.base_detr import DetectionTransformer
from mmdet.registry import MODELS
from mmdet.structures import OptSampleList, SampleList
from torch import Tensor, nn

from .denoising import DenoisingGenerator, DenoisingQueries, normalized_targets
from .rtdetr_decoder import RTDETRDecoder


def make_anchors(spatial_shapes: Sequence[tuple[int, int]], base_size: float = 0.05,
                 device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """One square box a token, from which the encoder's boxes start.

    Level l has boxes of side `base_size` * 2^l, centred on their cells.

    Args:
        spatial_shapes: (H, W) of each map.
        base_size: Side of the finest level's boxes, as a fraction of the image.
        device: Where the result lies.

    Returns:
        Logits (L, 4) of (cx, cy, w, h), +inf for invalid boxes, and (L, 1), True for valid ones,
        all of whose numbers lie within 0.01 and 0.99.
    """
    anchors = []
    for level, (height, width) in enumerate(spatial_shapes):
        rows = (torch.arange(height, device=device) + 0.5) / height
        columns = (torch.arange(width, device=device) + 0.5) / width
        center_y, center_x = torch.meshgrid(rows, columns, indexing='ij')
        side = torch.full_like(center_x, base_size * 2 ** level)
        anchors.append(torch.stack([center_x, center_y, side, side], -1).flatten(0, 1))
    anchors = torch.cat(anchors)
    valid = ((anchors > 0.01) & (anchors < 0.99)).all(-1, keepdim=True)
    return anchors.logit().masked_fill(~valid, float('inf')), valid


@MODELS.register_module()
class RTDETR(DetectionTransformer):
    """Real-time detection transformer on any backbone.

    NOTE: In mmdet's scheme (pre_transformer, encoder, pre_decoder, decoder) the neck is the
    encoder: what attention RT-DETR has before the decoder is part of it. There is no padding mask,
        hence
    `img_shape` may differ within a batch, but the padding is looked at.

    Args:
        backbone: Gives the maps that `neck` fuses.
        neck: Usually :class:`HybridEncoder`.
        decoder: Arguments of :class:`RTDETRDecoder`.
        bbox_head: Usually :class:`RTDETRHead`.
        num_queries: Queries; an image with fewer tokens gets as many as it has.
        dn_cfg: Arguments of :class:`DenoisingGenerator`, without `num_classes` and `embed_dims`.
        train_cfg: `assigner`, handed to the head.
        test_cfg: `max_per_img`, handed to the head.
        data_preprocessor: See mmdet's DetDataPreprocessor.
        init_cfg: See mmengine's BaseModule.

    Raises:
        ValueError: Decoder and head differ in `embed_dims`.
    """

    def __init__(self, backbone: dict, neck: dict, decoder: dict, bbox_head: dict,
                 num_queries: int = 300, dn_cfg: dict | None = None,
                 train_cfg: dict | None = None, test_cfg: dict | None = None,
                 data_preprocessor: dict | None = None, init_cfg: dict | None = None):
        # The config is the caller's: what is filled in here goes into copies.
        bbox_head = copy.deepcopy(bbox_head)
        bbox_head['num_pred_layer'] = decoder.get('num_layers', 6) + 1
        self.dn_cfg = dict(dn_cfg or {})
        super().__init__(backbone=backbone, neck=neck, decoder=dict(decoder), bbox_head=bbox_head,
                         num_queries=num_queries, train_cfg=train_cfg, test_cfg=test_cfg,
                         data_preprocessor=data_preprocessor, init_cfg=init_cfg)

    def _init_layers(self) -> None:
        """Build what lies between neck and head."""
        self.decoder = RTDETRDecoder(**self.decoder)
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

    def pre_transformer(self, img_feats: tuple[Tensor, ...],
                        batch_data_samples: OptSampleList = None) -> tuple[dict, dict]:
        """Project the maps and lay them out as the tokens that the decoder attends to."""
        memory, spatial_shapes = self.decoder.embed(img_feats)
        tokens = dict(memory=memory, spatial_shapes=spatial_shapes)
        return tokens, tokens

    def forward_encoder(self, memory: Tensor, spatial_shapes: list[tuple[int, int]]) -> dict:
        """Rate every token as a possible object and predict its box.

        Args:
            memory: (N, L, C).
            spatial_shapes: (H, W) of each map.

        Returns:
            Tokens (N, L, C), class logits (N, L, classes), box logits (N, L, 4).
        """
        anchors, valid = make_anchors(spatial_shapes, device=memory.device)
        tokens = self.memory_trans_norm(self.memory_trans_fc(memory * valid.to(memory.dtype)))
        # The last branches of the head are the encoder's.
        logits = self.bbox_head.cls_branches[-1](tokens).float()
        box_logits = self.bbox_head.reg_branches[-1](tokens).float() + anchors
        return dict(tokens=tokens, logits=logits, box_logits=box_logits)

    def pre_decoder(self, tokens: Tensor, logits: Tensor, box_logits: Tensor,
                    batch_data_samples: OptSampleList = None) -> tuple[dict, dict]:
        """Select the most promising tokens as queries and put the denoising queries before them.

        Args:
            tokens: (N, L, C).
            logits: (N, L, classes).
            box_logits: (N, L, 4).
            batch_data_samples: The images' `gt_instances`, needed in training.

        Returns:
            Arguments of the decoder (query, reference, attn_mask), and, in training, of the loss
            (encoder outputs of the selected tokens, denoising part).

        Raises:
            ValueError: There are no samples in training mode.
        """
        num_queries = min(self.num_queries, tokens.shape[1])
        index = logits.amax(-1).topk(num_queries, dim=1).indices[..., None]  # (N, Q, 1)

        def select(values: Tensor) -> Tensor:
            return values.gather(1, index.expand(-1, -1, values.shape[-1]))

        # The decoder doesn't train the encoder through its queries, only through the memory.
        query, reference = select(tokens).detach(), select(box_logits)
        decoder_inputs = dict(query=query, reference=reference.detach(), attn_mask=None)
        if not self.training:
            return decoder_inputs, {}

        if batch_data_samples is None:
            raise ValueError('RTDETR in training mode needs data samples with ground truth to make '
                             'its queries; call model.eval() to run it on images alone')
        denoising = self.dn_query_generator(normalized_targets(batch_data_samples), num_queries)
        if denoising is not None:
            decoder_inputs = self.prepend(denoising, **decoder_inputs)
        return decoder_inputs, dict(enc_logits=select(logits), enc_boxes=reference.sigmoid(),
                                    denoising=denoising)

    @staticmethod
    def prepend(denoising: DenoisingQueries, query: Tensor, reference: Tensor,
                attn_mask: None) -> dict:
        """The decoder's inputs with the denoising queries before the matching ones."""
        return dict(query=torch.cat([denoising.content.to(query.dtype), query], 1),
                    reference=torch.cat([denoising.reference, reference], 1),
                    attn_mask=denoising.attn_mask)

    def forward_decoder(self, query: Tensor, memory: Tensor, reference: Tensor,
                        spatial_shapes: list[tuple[int, int]],
                        attn_mask: Tensor | None = None) -> dict:
        """Run the decoder, see :meth:`RTDETRDecoder.forward`."""
        hidden_states, boxes = self.decoder(
            query, memory, reference, spatial_shapes, self.bbox_head.reg_branches, attn_mask)
        return dict(hidden_states=hidden_states, boxes=boxes)

    def loss(self, batch_inputs: Tensor, batch_data_samples: SampleList) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            batch_inputs: (N, 3, H, W).
            batch_data_samples: The images' `gt_instances`.

        Returns:
            See :meth:`RTDETRHead.loss_by_feat`.

        Raises:
            RuntimeError: The model is in eval mode, where queries and layers are left out.
        """
        if not self.training:
            raise RuntimeError("RTDETR computes losses in training mode only; call model.train() "
                               'before forward(mode="loss")')
        return super().loss(batch_inputs, batch_data_samples)
