// Runs a packaged language model, without Python: logits MODEL.pt2 IDS.txt [cpu|cuda]
//
// IDS.txt holds token ids, separated by white space. For the last of them the program prints one logit a line. The
// package holds dense and sparse attention and chooses by the number of ids.
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

std::vector<int64_t> read_ids(const std::string& path) {
  std::ifstream file(path);
  std::vector<int64_t> ids;
  for (int64_t id; file >> id;) ids.push_back(id);
  if (ids.empty() || !file.eof()) throw std::runtime_error(path + " holds no token ids, or something else");
  return ids;
}

int main(int argc, char** argv) {
  if (argc < 3) {
    std::cerr << "usage: logits MODEL.pt2 IDS.txt [cpu|cuda]\n";
    return 2;
  }
  try {
    const torch::Device device(argc > 3 ? argv[3] : "cpu");
    const c10::InferenceMode inference;
    std::vector<int64_t> ids = read_ids(argv[2]);
    const auto length = static_cast<int64_t>(ids.size());
    const auto input = torch::from_blob(ids.data(), {1, length}, torch::kInt64).to(device);

    torch::inductor::AOTIModelPackageLoader model(argv[1]);
    const torch::Tensor logits = model.run({input})[0];  // [1, length, vocabulary]

    const torch::Tensor last = logits[0][-1].to(torch::kCPU, torch::kFloat32).contiguous();
    std::cout.precision(9);
    for (int64_t token = 0; token < last.numel(); ++token) std::cout << last.data_ptr<float>()[token] << '\n';
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
