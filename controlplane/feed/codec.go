package feed

import (
	"google.golang.org/grpc/encoding"
	protocodec "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Codec is gRPC's codec for protocol buffers, except that an Update which was
// marshalled for one edge goes to all others as the same bytes. Give it to
// grpc.ForceServerCodecV2. Without it the feed works, but marshals each Update
// once per edge.
type Codec struct{}

// prepared is a SyncResponse with its wire form. It is a proto.Message itself,
// so any other codec, and whatever looks at messages, sees what it holds.
type prepared struct {
	*resealv1.SyncResponse
	wire []byte
}

// Marshal returns the wire form of v, a proto.Message.
func (Codec) Marshal(v any) (mem.BufferSlice, error) {
	if message, ok := v.(*prepared); ok {
		// A SliceBuffer is neither pooled nor written to by gRPC.
		return mem.BufferSlice{mem.SliceBuffer(message.wire)}, nil
	}
	return encoding.GetCodecV2(protocodec.Name).Marshal(v)
}

// Unmarshal parses data into v, a proto.Message.
func (Codec) Unmarshal(data mem.BufferSlice, v any) error {
	return encoding.GetCodecV2(protocodec.Name).Unmarshal(data, v)
}

// Name is the content subtype, "proto".
func (Codec) Name() string { return protocodec.Name }
