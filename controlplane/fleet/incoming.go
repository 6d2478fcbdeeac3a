package fleet

import (
	"bytes"
	"errors"
	"strings"
	"sync"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
)

// incoming is a ConnectRequest whose data is not copied: it is in gRPC's buffer until
// free. Edges say little, but thousands say it all day.
type incoming struct {
	conversation uint64
	method       string
	data         []byte
	more         bool
	end          bool

	buffer mem.Buffer
}

var errPiece = errors.New("a piece of a link can't be decoded")

// decode reads the message in buffer, which it takes over.
func (in *incoming) decode(buffer mem.Buffer) error {
	*in = incoming{buffer: buffer}
	for data := buffer.ReadOnlyData(); len(data) > 0; {
		number, kind, n := protowire.ConsumeTag(data)
		if n < 0 {
			return errPiece
		}
		data = data[n:]
		if n = in.field(number, kind, data); n < 0 {
			return errPiece
		}
		data = data[n:]
	}
	return nil
}

// field reads the value of a field, and returns its length.
func (in *incoming) field(number protowire.Number, kind protowire.Type, data []byte) (n int) {
	var flag uint64
	switch {
	case number == 1 && kind == protowire.VarintType:
		in.conversation, n = protowire.ConsumeVarint(data)
	case number == 2 && kind == protowire.BytesType:
		var method []byte
		method, n = protowire.ConsumeBytes(data)
		in.method = strings.ToValidUTF8(string(method), "?")
	case number == 3 && kind == protowire.BytesType:
		in.data, n = protowire.ConsumeBytes(data)
	case number == 4 && kind == protowire.VarintType:
		flag, n = protowire.ConsumeVarint(data)
		in.more = flag != 0
	case number == 5 && kind == protowire.VarintType:
		flag, n = protowire.ConsumeVarint(data)
		in.end = flag != 0
	default:
		n = protowire.ConsumeFieldValue(number, kind, data)
	}
	return n
}

// free gives gRPC's buffer back.
func (in *incoming) free() {
	if in.buffer != nil {
		in.buffer.Free()
	}
	*in = incoming{}
}

// wholes are buffers for messages that come in pieces. Few are under way at a time, and
// most edges never send another.
var wholes = sync.Pool{New: func() any { return new(bytes.Buffer) }}

// maxWhole bounds a buffer that is kept, in bytes.
const maxWhole = 1 << 20

// drop gives the buffer of an incomplete message back.
func (c *carried) drop() {
	if c.whole == nil {
		return
	}
	if c.whole.Cap() <= maxWhole {
		c.whole.Reset()
		wholes.Put(c.whole)
	}
	c.whole = nil
}

// length is how much of a message has come.
func (c *carried) length() int {
	if c.whole == nil {
		return 0
	}
	return c.whole.Len()
}
