package frontend

import (
	"encoding/binary"
	"io"

	"golang.org/x/net/http2"
)

// settingsReader reads a client's HTTP/2 stream for x/net/http2, which ends
// connections whose SETTINGS name a parameter twice. That is no error: values are
// taken in their order (RFC 9113 section 6.5.3). So such a frame is held back until
// it is whole, and passed on with one value of each parameter. It stays one frame,
// since there is one acknowledgement for each.
type settingsReader struct {
	src   io.Reader
	skip  int             // bytes that go through as they are, up to the next head
	head  [frameHead]byte // what frame lies in until it turns out to be longer
	frame []byte          // held back
	want  int             // bytes of it that are waited for; 0: none came yet
	ready []byte          // of frame, may be read
}

// maxHeldSettings bounds a frame that is held back, in bytes of its payload. More
// than a hundred parameters are too many for x/net/http2 anyway.
const maxHeldSettings = 100 * settingSize

const settingSize = 6

// Read implements io.Reader. After an error it may be called again.
func (r *settingsReader) Read(p []byte) (int, error) {
	for len(r.ready) == 0 {
		if r.skip > 0 {
			n, err := r.src.Read(p[:min(len(p), r.skip)])
			r.skip -= n
			return n, err
		}
		if r.want == 0 {
			r.frame, r.want = r.head[:0], frameHead
		}
		n, err := r.src.Read(r.frame[len(r.frame):r.want])
		r.frame = r.frame[:len(r.frame)+n]
		if len(r.frame) == r.want {
			r.whole()
		} else if err != nil {
			return 0, err
		}
	}
	n := copy(p, r.ready)
	r.ready = r.ready[n:]
	return n, nil
}

// whole goes on when all that was waited for is there.
func (r *settingsReader) whole() {
	length := int(r.frame[0])<<16 | int(r.frame[1])<<8 | int(r.frame[2])
	settings := http2.FrameType(r.frame[3]) == http2.FrameSettings &&
		!http2.Flags(r.frame[4]).Has(http2.FlagSettingsAck)
	switch {
	case r.want > frameHead:
		merged := mergeSettings(r.frame[frameHead:])
		r.frame = r.frame[:frameHead+len(merged)]
		r.frame[1], r.frame[2] = byte(len(merged)>>8), byte(len(merged))
	case settings && length > settingSize && length <= maxHeldSettings && length%settingSize == 0:
		r.want += length
		r.frame = append(make([]byte, 0, r.want), r.frame...)
		return
	default:
		r.skip = length
	}
	r.ready, r.want = r.frame, 0
}

// mergeSettings leaves, in place, one value of each parameter: the last one, but
// the first that is invalid, and the smallest of the header table, which the
// client may count on to have been in force (RFC 7541 section 4.2).
func mergeSettings(payload []byte) []byte {
	merged, places := payload[:0], map[http2.SettingID]int{}
	for ; len(payload) > 0; payload = payload[settingSize:] {
		now := settingAt(payload)
		place, again := places[now.ID]
		if !again {
			places[now.ID] = len(merged)
			merged = append(merged, payload[:settingSize]...)
			continue
		}
		before := settingAt(merged[place:])
		if before.Valid() != nil || now.ID == http2.SettingHeaderTableSize && now.Val > before.Val {
			continue
		}
		copy(merged[place:], payload[:settingSize])
	}
	return merged
}

func settingAt(p []byte) http2.Setting {
	return http2.Setting{ID: http2.SettingID(binary.BigEndian.Uint16(p)), Val: binary.BigEndian.Uint32(p[2:])}
}
