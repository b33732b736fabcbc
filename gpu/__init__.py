"""`make gpu`: one GPU host measured whole, in parts that survive being cut off. Starts what it needs through kilocopy; imports neither ray, vllm nor locust."""
