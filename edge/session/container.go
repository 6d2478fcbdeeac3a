package session

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"runtime"
	"time"

	"golang.org/x/crypto/cryptobyte"

	"github.com/reseal/reseal/edge/exchange"
)

// A container carries sessions out of the process: into the state directory, or
// to another edge. It holds secrets, in clear: whoever stores or sends it seals
// it.
//
//	"RSES"  format (1)  flags  release<0..255>  entry<0..2^24-1> ...
//
// The release is Go's, since the encoding of a session is one release's own
// business. All integers are big endian, times are seconds since 1970, 0 for
// none, turn is in microseconds.
//
//	entry:  identity<0..2^16-1>  flags  reuse  way  turn(4)  learned(8)  born(8)  useBy(8)
//	        path<0..2^16-1> of edge<0..255>  id<0..255>  ticket<0..2^16-1>
//	        session<0..2^24-1>
//
// An entry without a session tells what was learned of the identity's server.
const (
	containerMagic  = "RSES"
	containerFormat = 2

	flagClean   = 1 << 0 // of a container
	flagUsed    = 1 << 0 // of an entry
	flagRenewed = 1 << 1

	// maxContainer bounds what is kept in the state directory, in bytes.
	maxContainer = 8 << 20
	maxIdentity  = 1 << 10
	maxTicket    = 16 << 10
	maxSessionID = 32
	// maxPath bounds the edges through which a session came.
	maxPath = 16
	maxEdge = 63
)

var (
	errContainer = errors.New("malformed sessions")
	// errRelease is not a failure: after an upgrade the sessions are of the past.
	errRelease = errors.New("sessions of another release")
	errNoWay   = errors.New("sessions with such an ID are not resumed here")
)

// entry is one session as it travels.
type entry struct {
	identity exchange.Identity
	// used says that the ticket was offered, or that others hold it too.
	used bool
	// renewed says that the server declined a session before it gave this one.
	renewed   bool
	knowledge knowledge
	born      time.Time // when the server gave it
	useBy     time.Time
	path      []string // edges through which it came, the first made it
	id        []byte   // session ID, if it is offered by that
	ticket    []byte
	session   []byte // as tls.SessionState.Bytes encodes it
}

// container is a bounded container under construction.
type container struct {
	limit int
	data  []byte
}

func newContainer(limit int, clean bool) *container {
	var b cryptobyte.Builder
	b.AddBytes([]byte(containerMagic))
	b.AddUint8(containerFormat)
	if clean {
		b.AddUint8(flagClean)
	} else {
		b.AddUint8(0)
	}
	b.AddUint8LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes([]byte(runtime.Version())) })
	return &container{limit: limit, data: b.BytesOrPanic()}
}

// add reports whether e had room.
func (c *container) add(e entry) bool {
	encoded, err := e.encode()
	if err != nil || len(c.data)+3+len(encoded) > c.limit {
		return false
	}
	c.data = append(c.data, byte(len(encoded)>>16), byte(len(encoded)>>8), byte(len(encoded)))
	c.data = append(c.data, encoded...)
	clear(encoded)
	return true
}

// empty reports whether nothing was added.
func (c *container) empty() bool {
	return len(c.data) == flagsAt+2+len(runtime.Version())
}

func (e entry) encode() ([]byte, error) {
	if len(e.identity) > maxIdentity || len(e.ticket) > maxTicket || len(e.session) > maxEncoded || len(e.path) > maxPath {
		return nil, errContainer
	}
	var b cryptobyte.Builder
	b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes([]byte(e.identity)) })
	var flags uint8
	if e.used {
		flags |= flagUsed
	}
	if e.renewed {
		flags |= flagRenewed
	}
	b.AddUint8(flags)
	b.AddUint8(uint8(e.knowledge.reuse))
	b.AddUint8(uint8(e.knowledge.way))
	b.AddUint32(uint32(min(e.knowledge.turn, maxTurn) / time.Microsecond))
	for _, t := range []time.Time{e.knowledge.learned, e.born, e.useBy} {
		b.AddUint64(unixOf(t))
	}
	b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) {
		for _, edge := range e.path {
			b.AddUint8LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes([]byte(edge)) })
		}
	})
	b.AddUint8LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(e.id) })
	b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(e.ticket) })
	b.AddUint24LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(e.session) })
	return b.Bytes()
}

func unixOf(t time.Time) uint64 {
	if t.IsZero() || t.Unix() < 0 {
		return 0
	}
	return uint64(t.Unix())
}

// parseContainer reads a container of at most limit bytes. The entries share no
// memory with data.
func parseContainer(data []byte, limit int) (entries []entry, clean bool, err error) {
	s := cryptobyte.String(data)
	var magic []byte
	var format, flags uint8
	var release cryptobyte.String
	if len(data) > limit || !s.ReadBytes(&magic, len(containerMagic)) || string(magic) != containerMagic || !s.ReadUint8(&format) {
		return nil, false, errContainer
	}
	if format != containerFormat {
		return nil, false, fmt.Errorf("%w: format %d, not %d", errRelease, format, containerFormat)
	}
	if !s.ReadUint8(&flags) || flags&^flagClean != 0 || !s.ReadUint8LengthPrefixed(&release) {
		return nil, false, errContainer
	}
	if string(release) != runtime.Version() {
		return nil, false, fmt.Errorf("%w: %q, not %s", errRelease, release, runtime.Version())
	}
	for !s.Empty() {
		var encoded cryptobyte.String
		if !s.ReadUint24LengthPrefixed(&encoded) {
			return nil, false, errContainer
		}
		e, err := parseEntry(encoded)
		if err != nil {
			return nil, false, err
		}
		entries = append(entries, e)
	}
	return entries, flags&flagClean != 0, nil
}

func parseEntry(s cryptobyte.String) (entry, error) {
	var e entry
	var flags, reuse, way uint8
	var turn uint32
	var identity, path, id, ticket, session cryptobyte.String
	if !s.ReadUint16LengthPrefixed(&identity) || len(identity) > maxIdentity || len(identity) == 0 ||
		!s.ReadUint8(&flags) || flags&^(flagUsed|flagRenewed) != 0 ||
		!s.ReadUint8(&reuse) || reuse >= reuses || !s.ReadUint8(&way) || way >= ways || !s.ReadUint32(&turn) ||
		!readTime(&s, &e.knowledge.learned) || !readTime(&s, &e.born) || !readTime(&s, &e.useBy) ||
		!s.ReadUint16LengthPrefixed(&path) || !s.ReadUint8LengthPrefixed(&id) ||
		!s.ReadUint16LengthPrefixed(&ticket) || len(ticket) > maxTicket ||
		!s.ReadUint24LengthPrefixed(&session) || len(session) > maxEncoded || !s.Empty() {
		return entry{}, errContainer
	}
	if len(id) > maxSessionID || len(id) != 0 && len(ticket) != 0 || session.Empty() != (len(id) == 0 && len(ticket) == 0) {
		return entry{}, errContainer
	}
	e.knowledge.reuse, e.knowledge.way = reuseKind(reuse), idWay(way)
	e.knowledge.turn = min(time.Duration(turn)*time.Microsecond, maxTurn)
	e.identity, e.used, e.renewed = exchange.Identity(identity), flags&flagUsed != 0, flags&flagRenewed != 0
	for !path.Empty() {
		var edge cryptobyte.String
		if !path.ReadUint8LengthPrefixed(&edge) || len(edge) == 0 || len(edge) > maxEdge || len(e.path) == maxPath {
			return entry{}, errContainer
		}
		e.path = append(e.path, string(edge))
	}
	// Copies: crypto/tls keeps what it is given, and data is wiped.
	e.id, e.ticket, e.session = append([]byte(nil), id...), append([]byte(nil), ticket...), append([]byte(nil), session...)
	return e, nil
}

func readTime(s *cryptobyte.String, t *time.Time) bool {
	var seconds uint64
	if !s.ReadUint64(&seconds) || seconds > maxUnix {
		return false
	}
	*t = time.Time{}
	if seconds > 0 {
		*t = time.Unix(int64(seconds), 0)
	}
	return true
}

// entryOf is a held session of identity as it travels. Its session must be wiped
// after use.
func (h *held) entry(identity exchange.Identity, known knowledge) (entry, error) {
	e := entry{
		identity: identity, renewed: h.renewed, born: h.born, useBy: h.useBy, knowledge: known,
		used: h.worn(), path: h.path,
	}
	if h.byID != nil {
		e.id, e.session = h.byID.id, bytes.Clone(h.byID.encoded)
		return e, nil
	}
	ticket, session, err := h.state.ResumptionState()
	if err != nil || session == nil {
		return entry{}, errEncoding
	}
	e.ticket = ticket
	e.session, err = session.Bytes()
	return e, err
}

// held makes a session that can be offered from one that came from outside. The
// session's own checks are crypto/tls's and idSession.refusal's. onTop is whether
// crypto/tls can offer IDs.
func (e entry) held(session encodedSession, onTop bool, now time.Time) (*held, error) {
	var h *held
	var err error
	if len(e.id) > 0 {
		if h = newIDHeld(session, e.id, onTop, now); h == nil {
			err = errNoWay
		}
	} else {
		h, err = e.ticketHeld(session, now)
	}
	if err != nil {
		return nil, err
	}
	h.born, h.path, h.renewed, h.restored = e.born, e.path, e.renewed, true
	if e.useBy.Before(h.useBy) {
		h.useBy = e.useBy
	}
	if e.used && session.version == tls.VersionTLS13 {
		h.taken, h.lent = 1, true
	}
	return h, nil
}

func (e entry) ticketHeld(session encodedSession, now time.Time) (*held, error) {
	parsed, err := tls.ParseSessionState(session.encoded) // which keeps them
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errEncoding, err)
	}
	state, err := tls.NewResumptionState(e.ticket, parsed)
	if err != nil {
		return nil, err
	}
	h, ok := newHeld(state, now)
	if !ok {
		return nil, errEncoding
	}
	return h, nil
}
