package http2

import (
	"encoding/binary"
	"fmt"
)

// frameType is the type of a frame (RFC 9113 section 6).
type frameType uint8

const (
	frameData           frameType = 0x0
	frameHeaders        frameType = 0x1
	framePriority       frameType = 0x2
	frameReset          frameType = 0x3
	frameSettings       frameType = 0x4
	framePushPromise    frameType = 0x5
	framePing           frameType = 0x6
	frameGoAway         frameType = 0x7
	frameWindowUpdate   frameType = 0x8
	frameContinuation   frameType = 0x9
	framePriorityUpdate frameType = 0x10 // RFC 9218 section 7.1
)

// Flags; their meaning depends on the type.
const (
	flagAck        = 0x1
	flagEndStream  = 0x1
	flagEndHeaders = 0x4
	flagPadded     = 0x8
	flagPriority   = 0x20
)

const (
	frameHeadLen = 9
	minFrame     = 1 << 14   // the largest payload that everybody takes
	maxFrame     = 1<<24 - 1 // the largest that there can be
	maxWindow    = 1<<31 - 1 // of flow control
	maxStream    = 1<<31 - 1 // the last stream
	firstWindow  = 1<<16 - 1 // of connections, and of streams before SETTINGS
	preface      = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
)

// frame is the head of a frame (RFC 9113 section 4.1).
type frame struct {
	kind   frameType
	flags  uint8
	length int
	stream uint32
}

func parseFrame(b []byte) frame {
	_ = b[frameHeadLen-1]
	return frame{
		length: int(b[0])<<16 | int(b[1])<<8 | int(b[2]),
		kind:   frameType(b[3]),
		flags:  b[4],
		stream: binary.BigEndian.Uint32(b[5:]) & maxStream,
	}
}

func (f frame) has(flag uint8) bool { return f.flags&flag != 0 }

func appendFrame(dst []byte, kind frameType, flags uint8, stream uint32, length int) []byte {
	return append(dst, byte(length>>16), byte(length>>8), byte(length), byte(kind), flags,
		byte(stream>>24), byte(stream>>16), byte(stream>>8), byte(stream))
}

// Code is an error code (RFC 9113 section 7).
type Code uint32

// Error codes.
const (
	NoError            Code = 0x0
	ProtocolError      Code = 0x1
	InternalError      Code = 0x2
	FlowControlError   Code = 0x3
	SettingsTimeout    Code = 0x4
	StreamClosed       Code = 0x5
	FrameSizeError     Code = 0x6
	RefusedStream      Code = 0x7
	Cancel             Code = 0x8
	CompressionError   Code = 0x9
	ConnectError       Code = 0xa
	EnhanceYourCalm    Code = 0xb
	InadequateSecurity Code = 0xc
	HTTP11Required     Code = 0xd
)

var codeNames = [...]string{
	"NO_ERROR", "PROTOCOL_ERROR", "INTERNAL_ERROR", "FLOW_CONTROL_ERROR", "SETTINGS_TIMEOUT", "STREAM_CLOSED",
	"FRAME_SIZE_ERROR", "REFUSED_STREAM", "CANCEL", "COMPRESSION_ERROR", "CONNECT_ERROR", "ENHANCE_YOUR_CALM",
	"INADEQUATE_SECURITY", "HTTP_1_1_REQUIRED",
}

// String returns the code's name in RFC 9113.
func (c Code) String() string {
	if int(c) < len(codeNames) {
		return codeNames[c]
	}
	return fmt.Sprintf("code %#x", uint32(c))
}

// Error says what a peer did wrong. The machine has answered it: an error of the
// connection with GOAWAY, one of a stream with RST_STREAM.
type Error struct {
	// Code is the code that the peer is told.
	Code Code
	// Stream is the stream, or 0 for the connection.
	Stream uint32
	// Reason says what is wrong.
	Reason string
}

// Error implements error.
func (e *Error) Error() string {
	if e.Stream == 0 {
		return fmt.Sprintf("HTTP/2 connection: %s (%v)", e.Reason, e.Code)
	}
	return fmt.Sprintf("HTTP/2 stream %d: %s (%v)", e.Stream, e.Reason, e.Code)
}
