package http2

import (
	"encoding/binary"
	"math"
)

type settingID uint16

const (
	settingHeaderTableSize   settingID = 0x1
	settingEnablePush        settingID = 0x2
	settingMaxStreams        settingID = 0x3
	settingInitialWindow     settingID = 0x4
	settingMaxFrame          settingID = 0x5
	settingMaxHeaderList     settingID = 0x6
	settingExtendedConnect   settingID = 0x8 // RFC 8441 section 3
	settingNoRFC7540Priority settingID = 0x9 // RFC 9218 section 2.1
)

// settings are those of the peer (RFC 9113 section 6.5.2).
type settings struct {
	maxStreams      uint32
	maxHeaderList   uint32
	window          int
	maxFrame        int
	extendedConnect bool
	noPriorities    int8 // -1: not said
}

var defaultSettings = settings{
	maxStreams: math.MaxUint32, maxHeaderList: math.MaxUint32, window: firstWindow, maxFrame: minFrame, noPriorities: -1,
}

func appendSetting(dst []byte, id settingID, value uint32) []byte {
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint16(dst, uint16(id)), value)
}

// announce queues our first SETTINGS, with the window of the connection.
func (c *Conn) announce() {
	start := len(c.pending)
	p := appendFrame(c.pending, frameSettings, 0, 0, 0)
	if c.client {
		p = appendSetting(p, settingEnablePush, 0)
	} else {
		p = appendSetting(p, settingMaxStreams, uint32(c.cfg.MaxStreams))
		if c.cfg.ExtendedConnect {
			p = appendSetting(p, settingExtendedConnect, 1)
		}
		p = appendSetting(p, settingNoRFC7540Priority, 1)
	}
	p = appendSetting(p, settingInitialWindow, uint32(c.cfg.StreamWindow))
	if c.cfg.MaxFrame != minFrame {
		p = appendSetting(p, settingMaxFrame, uint32(c.cfg.MaxFrame))
	}
	p = appendSetting(p, settingMaxHeaderList, uint32(min(c.announcedHeader(), math.MaxUint32)))
	p[start+2] = byte(len(p) - start - frameHeadLen)
	c.pending = p
	c.unacked = append(c.unacked, firstWindow)
	c.slack = max(0, firstWindow-c.cfg.StreamWindow)
	if c.cfg.ConnWindow > firstWindow {
		c.sendWindowUpdate(0, c.cfg.ConnWindow-firstWindow)
		c.window = c.cfg.ConnWindow
	}
}

// announcedHeader is what the peer is told of MaxHeaderBytes. Clients are told of
// more: those that go by it fail on their own, and learn less than from a 431.
func (c *Conn) announcedHeader() int {
	if c.client {
		return c.cfg.MaxHeaderBytes
	}
	return 2 * c.cfg.MaxHeaderBytes
}

// SetInitialWindow changes StreamWindow, for open streams too (RFC 9113 section
// 6.9.2). n is at most 2^31-1.
func (c *Conn) SetInitialWindow(n int) {
	n = min(max(n, 0), maxWindow)
	for _, s := range c.streams.all {
		s.window += n - c.cfg.StreamWindow
	}
	// Until the peer acks, it may go by what was before.
	c.slack = max(0, c.slack+c.cfg.StreamWindow-n)
	c.unacked = append(c.unacked, c.cfg.StreamWindow)
	c.cfg.StreamWindow = n
	c.pending = appendSetting(appendFrame(c.pending, frameSettings, 0, 0, 6), settingInitialWindow, uint32(n))
}

// Unacked returns how many SETTINGS the peer has yet to acknowledge. How long it
// may take is for the caller to say, who then calls GoAway with SettingsTimeout
// (RFC 9113 section 6.5.3).
func (c *Conn) Unacked() int { return len(c.unacked) }

// settings takes SETTINGS (RFC 9113 section 6.5).
func (c *Conn) settings(f frame, p []byte, ev *Event) error {
	if f.has(flagAck) {
		return c.acked()
	}
	if c.settled {
		if err := c.pay(); err != nil {
			return err
		}
	}
	first := !c.settled
	c.settled = true
	for ; len(p) > 0; p = p[6:] {
		if err := c.setting(settingID(binary.BigEndian.Uint16(p)), binary.BigEndian.Uint32(p[2:]), first); err != nil {
			return err
		}
	}
	c.pending = appendFrame(c.pending, frameSettings, flagAck, 0, 0)
	ev.Kind = Settings
	return nil
}

// acked drops the oldest of our SETTINGS that have not been acknowledged. What
// the peer may send by older ones ends.
func (c *Conn) acked() error {
	if len(c.unacked) == 0 {
		return c.fail(ProtocolError, "SETTINGS are acknowledged that were not sent (RFC 9113 section 6.5)")
	}
	c.unacked = c.unacked[1:]
	c.slack = 0
	for _, window := range c.unacked {
		c.slack = max(c.slack, window-c.cfg.StreamWindow)
	}
	if len(c.unacked) == 0 {
		c.unacked = nil
	}
	return nil
}

func (c *Conn) setting(id settingID, value uint32, first bool) error {
	switch id {
	case settingHeaderTableSize:
		c.encoder.resize(value)
	case settingEnablePush:
		if value > 1 || value == 1 && c.client {
			return c.fail(ProtocolError, "SETTINGS_ENABLE_PUSH has a value that it can't have (RFC 9113 section 6.5.2)")
		}
	case settingMaxStreams:
		c.peer.maxStreams = value
	case settingInitialWindow:
		return c.setSendWindow(value)
	case settingMaxFrame:
		if value < minFrame || value > maxFrame {
			return c.fail(ProtocolError, "SETTINGS_MAX_FRAME_SIZE has a value that it can't have (RFC 9113 section 6.5.2)")
		}
		c.peer.maxFrame = int(value)
	case settingMaxHeaderList:
		c.peer.maxHeaderList = value
	case settingExtendedConnect:
		if value > 1 || value == 0 && c.peer.extendedConnect {
			return c.fail(ProtocolError, "SETTINGS_ENABLE_CONNECT_PROTOCOL is not 1, or taken back (RFC 8441 section 3)")
		}
		c.peer.extendedConnect = value == 1
	case settingNoRFC7540Priority:
		if value > 1 || !first && int8(value) != max(0, c.peer.noPriorities) {
			return c.fail(ProtocolError, "SETTINGS_NO_RFC7540_PRIORITIES has changed, or a value that it can't have (RFC 9218 section 2.1)")
		}
		c.peer.noPriorities = int8(value)
	}
	return nil
}

// setSendWindow takes SETTINGS_INITIAL_WINDOW_SIZE, for open streams too.
func (c *Conn) setSendWindow(value uint32) error {
	if value > maxWindow {
		return c.fail(FlowControlError, "SETTINGS_INITIAL_WINDOW_SIZE is beyond 2^31-1 (RFC 9113 section 6.5.2)")
	}
	for _, s := range c.streams.all {
		s.sendWindow += int(value) - c.peer.window
		if s.sendWindow > maxWindow {
			return c.fail(FlowControlError, "SETTINGS_INITIAL_WINDOW_SIZE takes a window beyond 2^31-1 (RFC 9113 section 6.9.2)")
		}
	}
	c.peer.window = int(value)
	return nil
}
