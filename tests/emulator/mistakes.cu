// What the emulator should find, for test_cuda_source.py: mistakes NAME ORDER prints what the kernel NAME wrote.
#include <cuda_runtime.h>

#include <map>
#include <string>

constexpr unsigned ALL = 0xffffffffu;

__global__ void none(float* y) {
  __shared__ float s[64];
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = s[63 - threadIdx.x] + __shfl_xor_sync(ALL, threadIdx.x % 32, 1) / 100;
}
__global__ void missing_barrier(float* y) {
  __shared__ float s[64];
  s[threadIdx.x] = threadIdx.x;
  y[threadIdx.x] = s[63 - threadIdx.x];
}
__global__ void missing_second_barrier(float* y) {              // seen only if one warp can be a whole round ahead
  __shared__ float s[2];
  for (int round = 0; round < 2; ++round) {
    if (threadIdx.x % 32 == 0) s[threadIdx.x / 32] = round;
    __syncthreads();
    y[threadIdx.x] += __shfl_xor_sync(ALL, s[1 - threadIdx.x / 32], 1);
  }
}
__global__ void two_barriers(float*) {
  if (threadIdx.x < 7) __syncthreads();
  else
    __syncthreads();
}
__global__ void barrier_and_shuffle(float*) {
  if (threadIdx.x < 7) __syncthreads();
  else __shfl_xor_sync(ALL, 0, 1);
}
__global__ void wrong_mask(float*) { __shfl_xor_sync(0xffff, 0, 1); }
__global__ void exited_lanes(float* y) {
  if (threadIdx.x % 32 >= 24) return;
  y[threadIdx.x] = __shfl_xor_sync(ALL, threadIdx.x, 16);
}
__global__ void unwritten_shared(float* y) {
  __shared__ float s[64];
  y[threadIdx.x] = s[threadIdx.x];
  s[threadIdx.x] = 0;                                           // for the second block
}
__global__ void large_frame(float* y) {
  volatile char frame[66000];
  for (volatile char& byte : frame) byte = 1;
  y[threadIdx.x] = frame[threadIdx.x];
}

int main(int, char** arguments) {
  const std::string name = arguments[1];
  emulator_order = std::atoi(arguments[2]);
  const std::map<std::string, void (*)(float*)> kernels{
      {"none", none}, {"missing_barrier", missing_barrier}, {"missing_second_barrier", missing_second_barrier},
      {"two_barriers", two_barriers}, {"barrier_and_shuffle", barrier_and_shuffle}, {"wrong_mask", wrong_mask},
      {"exited_lanes", exited_lanes}, {"unwritten_shared", unwritten_shared}, {"large_frame", large_frame},
      {"no_blocks", none}, {"no_threads", none}, {"many_threads", none}};
  cudaLaunchConfig_t config{};
  config.gridDim = name == "no_blocks" ? 0 : 2;
  config.blockDim = name == "no_threads" ? dim3(0) : name == "many_threads" ? dim3(32, 33) : dim3(64);
  float y[64] = {};
  cudaLaunchKernelEx(&config, kernels.at(name), y);
  for (float value : y) std::printf("%g ", value);
}
