package backend

import "encoding/binary"

// frames follows the HTTP/2 frames that a peer sends, for what they say of the
// connection as a whole (RFC 9113 sections 4.1, 6.4, 6.5 and 6.8).
// x/net/http2 knows it too, but answers only when no Write is under way, which a
// peer that stopped reading holds up for as long as it likes.
type frames struct {
	head [9]byte
	have int // bytes of head
	left int // bytes of the payload still to come
	item [6]byte
	some int // bytes of item

	// What was seen so far.
	streams  uint32 // SETTINGS_MAX_CONCURRENT_STREAMS
	settings bool   // a SETTINGS frame came to its end
	unwanted bool   // the peer wants no more requests
}

const (
	frameReset    = 0x3
	frameSettings = 0x4
	frameGoAway   = 0x7

	flagAck              = 0x1
	settingMaxConcurrent = 0x3
	codeProtocolError    = 0x1
)

// defaultStreams is taken for the limit of a peer that names none (RFC 9113
// section 6.5.2: there is none), as x/net/http2 does.
const defaultStreams = 1000

func newFrames() *frames { return &frames{streams: defaultStreams} }

// see follows bytes of the peer.
func (f *frames) see(p []byte) {
	for len(p) > 0 {
		if f.have < len(f.head) {
			n := copy(f.head[f.have:], p)
			f.have += n
			p = p[n:]
			if f.have < len(f.head) {
				return
			}
			f.left, f.some = int(binary.BigEndian.Uint32(f.head[:4])>>8), 0
			f.unwanted = f.unwanted || f.head[3] == frameGoAway
		}
		n := min(f.left, len(p))
		f.payload(p[:n])
		f.left -= n
		p = p[n:]
		if f.left == 0 {
			f.end()
			f.have = 0
		}
	}
}

// payload collects the entries of SETTINGS and the code of RST_STREAM.
func (f *frames) payload(p []byte) {
	size := 0
	switch f.head[3] {
	case frameSettings:
		size = 6
	case frameReset:
		size = 4
	}
	for size > 0 && len(p) > 0 {
		n := copy(f.item[f.some:size], p)
		f.some += n
		p = p[n:]
		if f.some < size {
			return
		}
		f.some = 0
		switch {
		case size == 4:
			// x/net/http2 gives such a connection no more requests.
			f.unwanted = f.unwanted || binary.BigEndian.Uint32(f.item[:4]) == codeProtocolError
		case binary.BigEndian.Uint16(f.item[:2]) == settingMaxConcurrent:
			f.streams = binary.BigEndian.Uint32(f.item[2:])
		}
	}
}

func (f *frames) end() {
	if f.head[3] == frameSettings && f.head[4]&flagAck == 0 {
		f.settings = true
	}
}
