package sessions

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/reseal/reseal/controlplane/fleet"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	maxIdentity    = 1 << 10
	maxCiphertext  = 64 << 10
	maxCertificate = 8 << 10
	maxSignature   = 256
	maxPools       = 1000
	maxName        = fleet.MaxText

	// Offers of one member: a burst is what it takes to seed an edge.
	offersPerSecond = 1000
	offersBurst     = 20_000
	// All other messages of one member.
	wordsPerSecond = 20
	wordsBurst     = 200
)

// Exchange implements resealv1.SessionServiceServer.
func (s *Server) Exchange(stream grpc.BidiStreamingServer[resealv1.ExchangeRequest, resealv1.ExchangeResponse]) error {
	return s.Exchanges().Serve(stream)
}

// Exchanges are the conversations in which edges exchange sessions.
func (s *Server) Exchanges() fleet.Service {
	return fleet.Service{Lines: s.lines, Open: s.begin, Message: func() proto.Message { return &resealv1.ExchangeRequest{} }}
}

func (s *Server) begin(ctx context.Context, line *fleet.Line) (fleet.Conversation, error) {
	id, labels, err := s.config.Edge(ctx)
	if err != nil {
		return nil, fleet.Denied(err)
	}
	if err := s.open(); err != nil {
		return nil, err
	}
	return &exchange{server: s, member: newMember(id, line), labels: labels, words: rate.NewLimiter(wordsPerSecond, wordsBurst)}, nil
}

// exchange is a conversation.
type exchange struct {
	server *Server
	member *member
	labels map[string]string // that the edge's token gave it
	joined bool
	words  *rate.Limiter
	offers *rate.Limiter // nil before the first
}

// Close implements fleet.Conversation.
func (x *exchange) Close() { x.server.leave(x.member) }

// Take implements fleet.Conversation.
func (x *exchange) Take(said proto.Message) (time.Duration, error) {
	message := said.(*resealv1.ExchangeRequest)
	limiter := x.words
	if message.GetOffer() != nil {
		if x.offers == nil {
			x.offers = rate.NewLimiter(offersPerSecond, offersBurst)
		}
		limiter = x.offers
	}
	delay := limiter.Reserve().Delay()
	if !x.joined && message.GetJoin() == nil {
		return 0, status.Error(codes.InvalidArgument, "the first message must be a join")
	}
	return delay, x.server.take(x.member, x.labels, message, &x.joined)
}

// Next implements fleet.Conversation.
func (x *exchange) Next() (fleet.Outgoing, error) {
	if message := x.server.next(x.member); message != nil {
		return fleet.Outgoing{Message: message}, nil
	}
	return fleet.Outgoing{}, nil
}

// open counts a stream in.
func (s *Server) open() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.streams >= maxMembers {
		return resealv1.ErrTooManyEdges
	}
	s.streams++
	return nil
}

// leave notes the end of a stream.
func (s *Server) leave(m *member) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.streams--
	m.left = true
	s.leaveLocked(m)
	if shadow := s.shadowed[m.id]; shadow != nil && s.members[m.id] == nil {
		delete(s.shadowed, m.id)
		s.members[m.id] = shadow
		s.relink(shadow)
	}
	s.queued -= m.underWay
	m.queue, m.underWay = nil, 0
}

// leaveLocked takes m out of the members, if it is one.
func (s *Server) leaveLocked(m *member) {
	if s.members[m.id] != m {
		return
	}
	delete(s.members, m.id)
	s.relayGone(m)
	for seeding := range m.awaiting {
		s.seeded(seeding)
	}
	for request := range m.asked {
		s.seedDone(m, request)
	}
	delete(s.freed, m)
	for id := range m.told { // each was told of m
		s.unlink(s.members[id], m)
	}
}

func (s *Server) take(m *member, labels map[string]string, message *resealv1.ExchangeRequest, joined *bool) error {
	switch message := message.GetMessage().(type) {
	case *resealv1.ExchangeRequest_Join:
		if err := s.checkJoin(m.id, message.Join); err != nil {
			return err
		}
		if labels == nil {
			labels = message.Join.GetLabels()
		}
		s.join(m, labels, message.Join, !*joined)
		*joined = true
	case *resealv1.ExchangeRequest_Holding:
		if tooMuch(message.Holding) {
			return invalid("holding has more than %d entries", maxPools)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		m.hold(message.Holding)
		s.relayMember(m)
	case *resealv1.ExchangeRequest_Offer:
		if err := checkOffer(m.id, message.Offer); err != nil {
			return err
		}
		s.pass(m, message.Offer)
	case *resealv1.ExchangeRequest_SeedDone:
		s.mu.Lock()
		defer s.mu.Unlock()
		s.seedDone(m, message.SeedDone.GetRequest())
	default:
		return invalid("empty message")
	}
	return nil
}

// join makes m a member, or changes what it said before.
func (s *Server) join(m *member, labels map[string]string, join *resealv1.ExchangeJoin, first bool) {
	revision := s.config.Revision()
	allowed := nameSet(s.config.Pools(labels))
	s.mu.Lock()
	defer s.mu.Unlock()
	if m.left {
		return
	}
	if first {
		if before := s.members[m.id]; before != nil {
			s.leaveLocked(before)
			if before.outlet != nil {
				s.shadowed[m.id] = before // until its replica says that it has left
			}
			before.end(fleet.Superseded(m.id))
		}
		s.members[m.id] = m
		s.forgetRevoked()
		for edge := range s.revoked {
			m.push(gone(edge, true))
		}
	}
	if s.members[m.id] != m {
		return // a newer stream took over
	}
	before := m.version
	m.learn(labels, join)
	added, changed := m.entitle(allowed, revision)
	if changed || m.version != before {
		s.relink(m)
	}
	s.relayMember(m) // first: what follows names it
	s.seed(m, added, s.holders(nameSet(added)), true)
}

// learn takes over what a member says of itself.
func (m *member) learn(labels map[string]string, join *resealv1.ExchangeJoin) {
	m.bootID, m.labels, m.certificate = join.GetBootId(), labels, join.GetCertificate()
	m.version = fmt.Sprintf("%s %x", m.bootID, sha256.Sum256(m.certificate))
	m.hold(join.GetHolding())
	m.wanted = slices.Compact(slices.Sorted(slices.Values(join.GetPools())))
}

func (m *member) hold(holding *resealv1.ExchangeHolding) {
	m.holding, m.spare, m.stock = nameSet(holding.GetPools()), nameSet(holding.GetSpare()), nameSet(holding.GetStock())
}

func nameSet(names []string) map[string]bool {
	set := make(map[string]bool, len(names))
	for _, name := range names {
		if !longName(name) {
			set[name] = true
		}
	}
	return set
}

func tooMuch(holding *resealv1.ExchangeHolding) bool {
	return len(holding.GetPools()) > maxPools || len(holding.GetSpare()) > maxPools || len(holding.GetStock()) > maxPools
}

func invalid(format string, args ...any) error {
	return status.Errorf(codes.InvalidArgument, format, args...)
}

func (s *Server) checkJoin(id string, join *resealv1.ExchangeJoin) error {
	if err := fleet.CheckID(join.GetEdge(), id); err != nil {
		return err
	}
	if len(join.GetPools()) > maxPools || tooMuch(join.GetHolding()) || slices.ContainsFunc(join.GetPools(), longName) {
		return invalid("join.pools has more than %d entries, or one of more than %d bytes", maxPools, maxName)
	}
	if longName(join.GetBootId()) || join.GetBootId() == "" {
		return invalid("join.boot_id must have 1 to %d bytes", maxName)
	}
	if !resealv1.Legible(join.GetBootId()) {
		return invalid("join.boot_id holds a control character")
	}
	if err := fleet.CheckLabels("join.labels", join.GetLabels()); err != nil {
		return err
	}
	if len(join.GetCertificate()) > maxCertificate {
		return invalid("join.certificate has more than %d bytes", maxCertificate)
	}
	if err := s.checkCertificate(id, join.GetCertificate()); err != nil {
		return status.Errorf(codes.PermissionDenied, "join.certificate: %v", err)
	}
	return nil
}

func longName(name string) bool { return len(name) > maxName }

// checkCertificate finds out early what would make every other edge refuse this
// one. The edges don't rely on it.
func (s *Server) checkCertificate(id string, der []byte) error {
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		return errors.New("it is not a certificate in DER")
	}
	if len(certificate.URIs) != 1 || certificate.URIs[0].Scheme != "spiffe" || certificate.URIs[0].Path != "/edge/"+id {
		return fmt.Errorf("it is for %v, not for edge %q", certificate.URIs, id)
	}
	if key, ok := certificate.PublicKey.(*ecdsa.PublicKey); !ok || key.Curve != elliptic.P256() {
		return errors.New("its key is not ECDSA P-256")
	}
	if now := time.Now(); now.After(certificate.NotAfter) {
		return fmt.Errorf("it expired on %s", certificate.NotAfter.Format(time.RFC3339))
	}
	if s.config.Roots == nil {
		return nil
	}
	_, err = certificate.Verify(x509.VerifyOptions{Roots: s.config.Roots(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	return err
}

func checkOffer(id string, offer *resealv1.SessionOffer) error {
	switch {
	case offer.GetOrigin() != id:
		return status.Errorf(codes.PermissionDenied, "edge %q can't offer for another", id)
	case len(offer.GetIdentity()) > maxIdentity, longName(offer.GetPool()), longName(offer.GetRecipient()), longName(offer.GetRecipientBootId()):
		return invalid("offer: a name is too long")
	case len(offer.GetCiphertext()) > maxCiphertext:
		return invalid("offer.ciphertext has more than %d bytes", maxCiphertext)
	case len(offer.GetCertificate()) > maxCertificate || len(offer.GetSignature()) > maxSignature:
		return invalid("offer: certificate or signature is too long")
	}
	return nil
}
