"""Train a Stable-Baselines3 PPO and export it as a teacher: an ONNX file for distill.py --teachers.

    python examples/onnx_teacher.py policy.onnx --env Hopper-v5 --steps 1000000
    python distill.py --datasets mujoco/hopper/medium-v0 --teachers policy.onnx

For a policy of your own: `export` takes any module from observations to (mean, log_std), in the environment's
units. Needs Stable-Baselines3: pip install stable-baselines3==2.9.2
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor


class Actor(torch.nn.Module):
    """The mean and log-std of a PPO's Gaussian policy, or the logits of a categorical one."""

    def __init__(self, policy: torch.nn.Module, obs_mean: Tensor, obs_std: Tensor):
        """policy: an ActorCriticPolicy of vectors. obs_mean, obs_std (O,): of its VecNormalize."""
        super().__init__()
        self.policy = policy
        self.register_buffer("obs_mean", obs_mean)
        self.register_buffer("obs_std", obs_std)

    def forward(self, observation: Tensor) -> tuple[Tensor, ...]:
        """(B, O) -> mean and log_std, each (B, A); or logits (B, n)."""
        x = ((observation - self.obs_mean) / self.obs_std).clamp(-10, 10)  # as VecNormalize does
        action = self.policy.action_net(self.policy.mlp_extractor.forward_actor(x))
        if not hasattr(self.policy, "log_std"):
            return (action,)
        return action, self.policy.log_std.expand_as(action)


def export(actor: torch.nn.Module, path: Path | str, observations: int) -> None:
    """Write an actor from `observations` numbers as one ONNX file, for batches of any size."""
    actor = actor.cpu().eval()
    example = torch.zeros(2, observations)
    torch.onnx.export(
        actor,
        (example,),
        path,
        dynamo=True,
        external_data=False,
        verbose=False,
        input_names=["observation"],
        output_names=["mean", "log_std"] if len(actor(example)) == 2 else ["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", help="to write")
    parser.add_argument("--env", default="Hopper-v5", help="Gymnasium's id; observations are vectors")
    parser.add_argument("--steps", type=int, default=1_000_000, help="of the environment")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    args = parse_args()
    vec = VecNormalize(make_vec_env(args.env, n_envs=16, seed=args.seed))
    ppo = PPO("MlpPolicy", vec, n_steps=256, batch_size=256, seed=args.seed, device="cpu")
    ppo.learn(args.steps)
    mean = torch.tensor(vec.obs_rms.mean, dtype=torch.float32)
    std = torch.tensor(vec.obs_rms.var + vec.epsilon, dtype=torch.float32).sqrt()
    export(Actor(ppo.policy, mean, std), args.file, len(mean))


if __name__ == "__main__":
    main()
