"""KDiffusion: parallel branches that imitate the teacher by reverse diffusion, then become one."""
