#include "data/subword_model.hpp"

namespace shardtune {

std::unique_ptr<SubwordModel> make_bpe(const TokenizerJson& /*file*/, const FieldPath& path, bool /*byte_level*/) {
  path.refuse("tokenizer model 'BPE' is not supported yet");
}

}  // namespace shardtune
