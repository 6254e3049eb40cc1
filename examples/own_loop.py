"""Blueprints, slices and the mean alone, around a training loop of your own: no Flower, no configuration, no files."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from twist_fl import (
    Blueprint,
    Division,
    StreamingMean,
    build_model,
    draw_round,
    draw_ticket,
    get_state,
    load_state,
    make_layout,
    slice_state,
)

torch.manual_seed(0)
config = GPT2Config(vocab_size=64, n_positions=32, n_embd=48, n_layer=3, n_head=6, bos_token_id=0, eos_token_id=0)
layout = make_layout(config.to_dict())
# Three workers hold 3 of 6 heads and 3 of 6 blocks of neurons, of all layers but the last.
division = Division("both", num_sub=((3, 3),) * 3, undivided_first=0, undivided_last=1)
state = get_state(GPT2LMHeadModel(config))
text = torch.arange(8 * 32).reshape(8, 32) % 7  # (windows, tokens)


def subnet(blueprint: Blueprint) -> PreTrainedModel:
    model = build_model(config, layout, blueprint, scale="sqrt")
    load_state(model, slice_state(layout, state, blueprint))
    return model


for round_ in range(1, 6):
    mean, losses = StreamingMean(layout, state), []
    for blueprint in draw_round(layout, division, seed=0, round_=round_):
        model = subnet(blueprint)  # a real, smaller model
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(15):
            loss = model(input_ids=text, labels=text).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        mean.add(blueprint, get_state(model), lasts=True)  # the worker's tensors are read at the end
    state = mean.finish()  # in place of the old one: means where blocks overlap, copies where they do not
    print(f"round {round_}: losses {[round(loss, 3) for loss in losses]}")

with torch.no_grad():
    ticket = subnet(draw_ticket(layout, division, num_sub=(2, 2), seed=0, draw=0))
    print(f"a ticket of 2 of 6 blocks: loss {ticket(input_ids=text, labels=text).loss:.3f}")
