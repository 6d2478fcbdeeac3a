package probe

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/session/abbreviated"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// JSSE that chooses certificates by server name resumes TLS 1.2 sessions by ID
// only if the ClientHello holds no session_ticket extension (RFC 5077). HAProxy,
// nginx, OpenSSL and Go send it, and so get nothing. Whether a backend is of that
// kind shows when sessions are not resumed with the extension and are without.

// probeBare finds out whether a backend whose sessions were not resumed with the
// session_ticket extension resumes them without it.
func (r *run) probeBare(ctx context.Context, c *chain) error {
	if r.cfg.Sessions == nil || c.facts.Unresumed == noSessions && !c.facts.EmptyTicket {
		return nil
	}
	if c.asked.resumed > 0 {
		c.facts.WithoutTicketExtension = answerNo
		return nil
	}
	bare := r.newChain(tls.VersionTLS12, &resealv1.ProbeVersion{})
	bare.handshaker = &bareHandshaker{closeTimeout: r.cfg.CloseTimeout}
	for _, purpose := range []string{
		"full, without ticket extension", "its session ID, without ticket extension", "the same once more",
	} {
		l, err := r.connect(ctx, bare, r.first(), purpose)
		if errors.Is(err, errEnough) || ctx.Err() != nil {
			return err
		}
		if err != nil {
			return nil // the record of the connection says why
		}
		if _, err := l.finish(endNotify); err != nil {
			return err
		}
		if ids := len(l.flight.sessionID); ids == 0 || !abbreviated.Supports(l.state.CipherSuite) {
			break
		}
	}
	if c.bare = bare.bare; c.bare.resumed > 0 {
		// What was found out with the extension says nothing about these sessions.
		c.facts.SingleUse = bare.reuse()
		c.facts.Survives = []*resealv1.ProbeSurvival{
			{Ending: endNotify, Answer: answerYes, Tried: uint32(c.bare.offered), Resumed: uint32(c.bare.resumed)},
		}
	}
	c.concludeBare()
	return nil
}

// concludeBare notes what was found out without the session_ticket extension.
func (c *chain) concludeBare() {
	if c.bare.resumed == 0 {
		if c.bare.offered > 0 {
			c.facts.WithoutTicketExtension = answerNo
		}
		return
	}
	if c.asked.offered > 0 || c.facts.EmptyTicket {
		c.facts.WithoutTicketExtension = answerYes
	}
	c.facts.Mechanism, c.facts.Unresumed = resealv1.Mechanism_MECHANISM_SESSION_ID, ""
}

// bareHandshaker makes handshakes without the session_ticket extension: the first
// one in full, further ones with its session ID.
type bareHandshaker struct {
	closeTimeout time.Duration
	session      *abbreviated.Session
}

// Handshake implements Handshaker. There is but one identity.
func (b *bareHandshaker) Handshake(ctx context.Context, conn net.Conn, _ exchange.Identity, cfg *tls.Config) (
	exchange.TLSConn, resealv1.Mechanism, resealv1.MissReason, error) {
	if b.session == nil {
		tc, err := b.full(ctx, conn, cfg)
		return tc, 0, resealv1.MissReason_MISS_REASON_NO_SESSION, err
	}
	tc := abbreviated.Client(conn, abbreviated.Config{Session: *b.session, Config: cfg})
	if err := tc.HandshakeContext(ctx); err != nil {
		// The server may be in the middle of a full handshake: let it hear of our end
		// before it sees an RST.
		_ = conn.SetReadDeadline(time.Now().Add(b.closeTimeout))
		_, _ = io.Copy(io.Discard, io.LimitReader(onlyReader{conn}, maxBody))
		return tc, 0, 0, err
	}
	return tc, resealv1.Mechanism_MECHANISM_SESSION_ID, 0, nil
}

// full makes the full handshake and keeps its session.
func (b *bareHandshaker) full(ctx context.Context, conn net.Conn, cfg *tls.Config) (exchange.TLSConn, error) {
	own := cfg.Clone()
	var log bytes.Buffer
	own.SessionTicketsDisabled, own.KeyLogWriter = true, &log
	tc := tls.Client(conn, own)
	if err := tc.HandshakeContext(ctx); err != nil {
		return tc, err
	}
	secret, err := masterSecret(log.Bytes())
	if err != nil {
		return tc, err
	}
	recorded, ok := conn.(*wire)
	if !ok {
		return tc, errors.New("the handshake was not recorded")
	}
	state, flight := tc.ConnectionState(), parseServerFlight(recorded.received(), nil)
	b.session = &abbreviated.Session{
		ID: flight.sessionID, Secret: secret, CipherSuite: state.CipherSuite,
		ExtendedMasterSecret: flight.answered.GetExtendedMasterSecret(),
		PeerCertificates:     state.PeerCertificates, VerifiedChains: state.VerifiedChains,
	}
	return tc, nil
}

// masterSecret reads a key log, "CLIENT_RANDOM <random> <secret>", and wipes it.
func masterSecret(log []byte) ([]byte, error) {
	defer clear(log)
	fields := bytes.Fields(log)
	if len(fields) != 3 || string(fields[0]) != "CLIENT_RANDOM" {
		return nil, errors.New("unexpected key log")
	}
	secret := make([]byte, hex.DecodedLen(len(fields[2])))
	if _, err := hex.Decode(secret, fields[2]); err != nil {
		return nil, fmt.Errorf("unexpected key log: %w", err)
	}
	return secret, nil
}
