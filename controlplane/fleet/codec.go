package fleet

import (
	"google.golang.org/grpc/encoding"
	protocodec "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
)

// Codec is gRPC's codec for protocol buffers, except that what was marshalled for one
// edge, as Prepared, goes to all others as the same bytes. Give it to
// grpc.ForceServerCodecV2. Without it streams work, but marshal such a message once per
// edge; links need it.
type Codec struct{}

// Prepared is a message with its wire form. It is a proto.Message itself, so any other
// codec, and whatever looks at messages, sees what it holds.
type Prepared struct {
	proto.Message
	Wire []byte
}

// Raw is a message of an edge as it came, for conversations that decode it themselves
// (Service.Raw). It belongs to them for the time of a call of Take.
type Raw struct {
	// Message is the message when another codec than this package's has decoded it.
	proto.Message
	// Data is its wire form. Nil: Message holds it.
	Data []byte
}

// Bytes are the message's wire form.
func (r *Raw) Bytes() ([]byte, error) {
	if r.Data != nil || r.Message == nil {
		return r.Data, nil
	}
	return proto.Marshal(r.Message)
}

// pieces are an encoded message, in two parts.
type pieces struct{ head, data []byte }

// Marshal returns the wire form of v, a proto.Message.
func (Codec) Marshal(v any) (mem.BufferSlice, error) {
	if message, ok := v.(*Prepared); ok {
		// A SliceBuffer is neither pooled nor written to by gRPC.
		return mem.BufferSlice{mem.SliceBuffer(message.Wire)}, nil
	}
	if message, ok := v.(*pieces); ok {
		return mem.BufferSlice{mem.SliceBuffer(message.head), mem.SliceBuffer(message.data)}, nil
	}
	return encoding.GetCodecV2(protocodec.Name).Marshal(v)
}

// Unmarshal parses data into v, a proto.Message.
func (Codec) Unmarshal(data mem.BufferSlice, v any) error {
	switch v := v.(type) {
	case *Raw:
		v.Data = data.Materialize()
		return nil
	case *incoming:
		return v.decode(data.MaterializeToBuffer(mem.DefaultBufferPool()))
	}
	return encoding.GetCodecV2(protocodec.Name).Unmarshal(data, v)
}

// Name is the content subtype, "proto".
func (Codec) Name() string { return protocodec.Name }
