"""A real backend for the execution envelope: it deploys a small language model as child processes.

`python -m proving_ground` serves the routes an unpatched `kamiwaza-sdk` client calls. What a deployment is granted is
enforced by the operating system on the engine process, so that *requested* and *granted* can be compared with facts.
"""
