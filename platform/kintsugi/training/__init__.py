"""Training: state that resumes, a plain PyTorch loop, and Ray Train around it."""
