"""diffusers' names of the layers of a DiT, and ours."""

__all__ = ["BLOCK_NAMES", "OUTER_NAMES"]

# diffusers' names of what is in every block, and ours
BLOCK_NAMES = {
    "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "norm1.linear": "blocks.{}.adaLN_modulation.1",
    "attn1.to_out.0": "blocks.{}.attn.proj",
    "ff.net.0.proj": "blocks.{}.mlp.fc1",
    "ff.net.2": "blocks.{}.mlp.fc2",
}
OUTER_NAMES = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
