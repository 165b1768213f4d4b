// tokenizer.json: either it is refused or it encodes any text.
#include "data/tokenizer.hpp"
#include "tests/fuzz/fuzz_support.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  using namespace shardtune;
  static const auto directory = fuzz::scratch_directory();
  fuzz::put(directory / "tokenizer.json", fuzz::as_text(bytes, size));
  fuzz::accepts([&] {
    const std::unique_ptr<Tokenizer> tokenizer = load_tokenizer(directory);
    for (const std::string_view text : {"", "a", "Hello, w\xc3\xb6rld 12345!",
                                        "w1 w2  [CLS] \xe4\xbd\xa0\xe5\xa5\xbd \xf0\x9f\x98\x80 \xcc\x81\t\n <s>",
                                        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}) {
      for (const bool details : {false, true}) {
        fuzz::accepts([&] {
          const Encoding one = tokenizer->encode(text, std::nullopt, {.want_details = details});
          const Encoding two = tokenizer->encode(text, "b c", {.want_details = details, .max_length = 7});
          fuzz::require(one.ids.size() == one.type_ids.size() && two.ids.size() == two.type_ids.size());
          for (const std::int32_t id : one.ids) fuzz::require(id >= 0), tokenizer->id_to_token(id);
        });
      }
    }
  });
  return 0;
}
