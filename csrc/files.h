// Rows of records that lie in files, copied into a batch by threads of its own.
//
// The file is mapped, and before rows are touched the kernel is asked whether it has their pages
// (mincore), and else to bring them in (MADV_POPULATE_READ, Linux 5.14), which reports an error
// where touching them would be SIGBUS. Where that is not to be had, or fails, pread does the work
// and names the error. (What is left: a file that is cut short, or a page that is evicted and then
// fails to be read again, in the microseconds before the copy.) Pages that were there in the last
// epoch, too, are asked about in a sixtieth of the time in which they are brought in again. From a
// warm page cache the map is twice as fast as pread: nothing is copied by the kernel, and rows are
// written past the caches.
//
// Bytes: each row asked for once in, once out. The limit is memory bandwidth where the pages are
// cached, else the disk's.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace salt {

class File {
 public:
  explicit File(const std::string& path);  // throws std::system_error
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  void advise(int64_t start,
              int64_t bytes) const;  // read these into the page cache, and do not wait for it
  // Whether memory holds all of the map from `start` to `end`; false, too, where that is not told:
  // Linux calls every page resident to whom a file is neither his nor to be written, and so do some
  // sandboxes to all.
  bool resident(int64_t start, int64_t end) const;
  const int fd;
  int64_t mapped = 0;         // bytes, when it was opened; the map has a page more
  const char* map = nullptr;  // null where the file cannot be mapped
};

// One record: rows of row_bytes from byte `start` on. Row n goes to out + n * out_row_bytes where
// wanted[n] (all where it is null).
struct Record {
  const File* file;
  int64_t start;
  const uint8_t* wanted;
  char* out;
  const float* scale;  // null: the bytes as they are. [row_bytes]: int8 entries, written as float16
                       // entry * scale * token
  const float* tokens;  // a factor for each of the record's rows; null: 1
};

struct ReadError {
  int64_t record = -1,
          row = 0;  // the first that failed, and the first row of the piece that did; -1: none
  int number = 0;   // errno, or 0 where the file ended before the row did
};

ReadError read_rows(const std::vector<Record>& records, int64_t rows, int64_t row_bytes,
                    int threads);

// out[d] = float16(q[d] * scale[d] * token), each rounded to nearest even. In cpu.cpp.
void dequantise_row(const int8_t* q, const float* scale, float token, int64_t D, uint16_t* out);

}  // namespace salt
