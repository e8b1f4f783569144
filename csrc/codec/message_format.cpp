#include "codec/message_format.h"

#include <c10/util/StringUtil.h>

namespace torch_rpc_mpi {

Outline readOutline(Reader& reader) {
  Outline outline{};
  outline.head = reader.get<BodyHead>();
  if (outline.head.slices > reader.left() / sizeof(uint64_t)) {
    throw BadMessage(
        c10::str(
            "it ends early: it announces ", outline.head.slices, " storages, and ", reader.left(),
            " bytes are left for their sizes"));
  }
  outline.sizes.resize(outline.head.slices);
  outline.inside.resize(outline.head.slices);
  for (size_t i = 0; i < outline.sizes.size(); ++i) {
    const auto size = reader.get<uint64_t>();
    outline.inside[i] = (size & kInside) != 0;
    outline.sizes[i] = size & ~kInside;
  }
  if (outline.head.placed != 0) {
    require(outline.head.slices <= reader.left() / sizeof(SlicePlace), "it ends early");
    for (size_t i = 0; i < outline.sizes.size(); ++i) {
      outline.places.push_back(reader.get<SlicePlace>());
    }
  }
  require(outline.head.tickets <= kTickets, "it lends more than there is");
  for (size_t i = 0; i < outline.head.tickets; ++i) {
    outline.tickets.push_back(reader.get<Ticket>());
  }
  outline.descriptions = {reader.take(outline.head.descriptionBytes), outline.head.descriptionBytes};
  return outline;
}

} // namespace torch_rpc_mpi
