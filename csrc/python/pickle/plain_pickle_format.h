// What plain pickles are made of: a few of the opcodes of Python's pickle protocol 4 (pickletools.py), no frames, and
// in the memo nothing but the functions that stand for things out of band.
#pragma once

#include <string_view>

namespace torch_rpc_mpi::plain_pickle {

inline constexpr std::string_view kStart = "\x80\x04";

inline constexpr char kNone = 'N';
inline constexpr char kTrue = '\x88';
inline constexpr char kFalse = '\x89';
inline constexpr char kInt1 = 'K';                    // BININT1, unsigned
inline constexpr char kInt2 = 'M';                    // BININT2, unsigned
inline constexpr char kInt4 = 'J';                    // BININT
inline constexpr std::string_view kInt8 = "\x8a\x08"; // LONG1 of 8 bytes
inline constexpr char kFloat = 'G';
inline constexpr char kShortText = '\x8c'; // SHORT_BINUNICODE
inline constexpr char kText = 'X';         // BINUNICODE
inline constexpr char kShortBytes = 'C';
inline constexpr char kBytes = 'B';
inline constexpr char kEmptyTuple = ')';
inline constexpr std::string_view kTuples = "\x85\x86\x87"; // TUPLE1 to TUPLE3
inline constexpr char kTuple = 't';
inline constexpr char kEmptyList = ']';
inline constexpr char kAppends = 'e';
inline constexpr char kEmptyDict = '}';
inline constexpr char kSetItems = 'u';
inline constexpr char kMark = '(';
inline constexpr char kGlobal = '\x93'; // STACK_GLOBAL
inline constexpr char kMemoGet = 'h';   // BINGET
inline constexpr char kReduce = 'R';
inline constexpr char kNewObject = '\x81';
inline constexpr char kStop = '.';
// After the end, where nobody reads it but the callee: the caller can send this call, without RRefs, by value as well.
inline constexpr std::string_view kResendable = " may be sent again";

// The names of torch's class for calls, and of what torch_rpc_mpi._pickler has for things out of band. Each of the
// latter is memoized where it comes first.
inline constexpr std::string_view kCallType = "\x8c\x1etorch.distributed.rpc.internal\x8c\x09PythonUDF\x93";
inline constexpr std::string_view kReceiveTensor = "\x8c\x16torch_rpc_mpi._pickler\x8c\x0f_receive_tensor\x93\x94";
inline constexpr std::string_view kMemoOfTensors("h\0", 2);    // where there are no RRefs
inline constexpr std::string_view kFirstTensor("K\0\x85R", 4); // the call of that for number 0
inline constexpr std::string_view kReceiveRRef = "\x8c\x16torch_rpc_mpi._pickler\x8c\x0d_receive_rref\x93\x94";

} // namespace torch_rpc_mpi::plain_pickle
