package keyring

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/reseal/reseal/controlplane/fleet"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// helloTimeout bounds the wait for the first request.
	helloTimeout = 10 * time.Second
	// answerTimeout bounds the wait for an ack.
	answerTimeout = time.Minute
	// What comes faster from one edge waits.
	wordsPerSecond = 20
	wordsBurst     = 200
)

// Bounds on what edges say. Lengths are in bytes.
const (
	maxLabels   = fleet.MaxLabels
	maxText     = fleet.MaxText
	maxKeyrings = 1024
)

// hold is one stream of one edge. Any error ends all of it; the edge comes back.
type hold struct {
	server   *Server
	line     *fleet.Line
	id       string
	labels   map[string]string
	words    *rate.Limiter
	deadline *time.Timer // of what is awaited of the edge

	entry    *entry            // nil before the first request
	era      int               // of the state when the stream began
	claims   map[string]uint64 // the newest epochs that the edge held then, by keyring
	began    time.Time
	welcomed bool
	serial   uint64 // of the newest response
	sent     *set   // what it holds, nil: none was sent
	answered bool   // it is acked
}

// set is what an edge should hold, without the secrets.
type set struct {
	key      string // equal sets have equal keys
	keyrings []setOf
}

type setOf struct {
	keyringSpec
	*stored
}

// Hold implements resealv1.KeyringServiceServer.
func (s *Server) Hold(stream grpc.BidiStreamingServer[resealv1.HoldRequest, resealv1.HoldResponse]) error {
	return s.Holds().Serve(stream)
}

// Holds are the conversations in which edges get their keys.
func (s *Server) Holds() fleet.Service {
	return fleet.Service{Lines: s.lines, Open: s.open, Message: func() proto.Message { return &resealv1.HoldRequest{} }}
}

func (s *Server) open(ctx context.Context, line *fleet.Line) (fleet.Conversation, error) {
	id, labels, err := s.config.Edge(ctx)
	if err != nil {
		return nil, fleet.Denied(err)
	}
	h := &hold{server: s, line: line, id: id, labels: labels, words: rate.NewLimiter(wordsPerSecond, wordsBurst)}
	h.deadline = time.AfterFunc(helloTimeout, h.late)
	return h, nil
}

// late ends a stream whose edge does not say what it should.
func (h *hold) late() {
	h.line.Do(func() {
		switch {
		case h.entry == nil:
			h.line.End(status.Errorf(codes.DeadlineExceeded, "no request within %s", helloTimeout))
		case h.sent != nil && !h.answered:
			h.line.End(status.Errorf(codes.DeadlineExceeded, "no ack of serial %d within %s", h.serial, answerTimeout))
		}
	})
}

// Close implements fleet.Conversation.
func (h *hold) Close() {
	h.deadline.Stop()
	if h.entry != nil {
		h.server.roster.leave(h.entry)
		h.server.log.Debug("edge ended its keyring stream", "edge", h.id, "reason", status.Convert(h.line.Err()).Message())
	}
}

// Take implements fleet.Conversation.
func (h *hold) Take(said proto.Message) (time.Duration, error) {
	message := said.(*resealv1.HoldRequest)
	delay := h.words.Reserve().Delay()
	if h.entry != nil {
		return delay, h.ack(message)
	}
	if err := checkFirst(message, h.id); err != nil {
		return 0, err
	}
	h.deadline.Stop()
	if h.labels == nil {
		h.labels = message.GetLabels()
	}
	h.claims = newestOf(message)
	h.era, h.began = h.server.state.currentEra(), time.Now()
	h.entry = h.server.roster.join(h.id, h.labels, h.line)
	h.line.Wake()
	return delay, nil
}

// Next implements fleet.Conversation.
func (h *hold) Next() (fleet.Outgoing, error) {
	if h.entry == nil {
		return fleet.Outgoing{}, nil
	}
	if !h.welcomed {
		h.welcomed = true
		return fleet.Outgoing{Message: fleet.Welcome}, nil
	}
	response, err := h.advance()
	if response == nil || err != nil {
		return fleet.Outgoing{}, err
	}
	return fleet.Outgoing{Message: response, Sent: func(bool) { wipe(response) }}, nil
}

// wipe zeroes the secrets of a response that gRPC has encoded.
func wipe(response *resealv1.HoldResponse) {
	for _, keyring := range response.GetKeyrings() {
		for _, e := range keyring.GetEpochs() {
			clear(e.GetSecret())
		}
	}
}

// checkFirst admits the first request of the edge whose certificate names id.
func checkFirst(request *resealv1.HoldRequest, id string) error {
	if err := fleet.CheckID(request.GetEdge(), id); err != nil {
		return err
	}
	if request.GetSerial() != 0 {
		return status.Errorf(codes.InvalidArgument, "serial: %d in the first request, it must be 0", request.GetSerial())
	}
	if err := fleet.CheckLabels("labels", request.GetLabels()); err != nil {
		return err
	}
	return checkHeld(request)
}

func checkHeld(request *resealv1.HoldRequest) error {
	if len(request.GetKeyrings()) > maxKeyrings {
		return status.Errorf(codes.InvalidArgument, "keyrings: there are %d, at most %d are allowed", len(request.GetKeyrings()), maxKeyrings)
	}
	for i, keyring := range request.GetKeyrings() {
		if len(keyring.GetName()) > maxText || len(keyring.GetEpochs()) > 2*MaxEpochs {
			return status.Errorf(codes.InvalidArgument, "keyrings[%d]: its name or its list of epochs is too long", i)
		}
		if !slices.IsSorted(keyring.GetEpochs()) {
			return status.Errorf(codes.InvalidArgument, "keyrings[%d].epochs: they must be sorted", i)
		}
	}
	return nil
}

func cut(text string) string { return strings.ToValidUTF8(fleet.Cut(text, maxText), "") }

// newestOf are the newest epochs that an edge holds, by keyring.
func newestOf(request *resealv1.HoldRequest) map[string]uint64 {
	claims := map[string]uint64{}
	for _, keyring := range request.GetKeyrings() {
		if n := len(keyring.GetEpochs()); n > 0 {
			claims[keyring.GetName()] = keyring.GetEpochs()[n-1]
		}
	}
	return claims
}

// advance prepares the next response, nil while the edge holds all or still owes an
// ack.
func (h *hold) advance() (*resealv1.HoldResponse, error) {
	for {
		next, err := h.server.setFor(h)
		if next == nil || err != nil {
			return nil, err
		}
		if h.sent != nil && (!h.answered || h.sent.key == next.key) {
			return nil, nil
		}
		response, ok := h.server.fill(next)
		if !ok {
			// A secret was erased meanwhile: there is a newer set.
			continue
		}
		h.serial++
		response.Serial = h.serial
		h.sent, h.answered = next, false
		h.claims = nil // it has served its purpose
		h.deadline.Reset(answerTimeout)
		return response, nil
	}
}

// setFor is what the edge should hold, nil while that is not known.
func (s *Server) setFor(h *hold) (*set, error) {
	open := s.roster.isOpen()
	st := s.state
	st.mu.Lock()
	defer st.mu.Unlock()
	if h.era != st.era {
		return nil, status.Error(codes.Unavailable, "the store was restored, start again")
	}
	if !open || !st.ready() || st.behind() {
		return nil, nil
	}
	if h.sent == nil && !st.knows(h.claims, h.began) {
		s.doubt()
		return nil, nil
	}
	next := &set{}
	var key strings.Builder
	for _, k := range st.specs {
		found := st.current(k)
		if !k.selects(h.labels) || found == nil {
			continue
		}
		if found.problem != nil {
			// What a response does not name is erased, so none is sent.
			return nil, status.Errorf(codes.Unavailable, "keyring %q can't be read, see the control plane's log", k.name)
		}
		fmt.Fprintf(&key, "%s %d %s %s\n", k.name, found.revision, k.spec.GetRetireAfter().AsDuration(), k.spec.GetMaxActiveAge().AsDuration())
		next.keyrings = append(next.keyrings, setOf{k, found})
	}
	next.key = key.String()
	return next, nil
}

// fill makes a response of a set. It is false when the set is not the newest.
func (s *Server) fill(next *set) (*resealv1.HoldResponse, bool) {
	response := &resealv1.HoldResponse{}
	for _, k := range next.keyrings {
		message := &resealv1.KeyringSecrets{
			Name:         k.name,
			RetireAfter:  durationpb.New(k.spec.GetRetireAfter().AsDuration()),
			MaxActiveAge: durationpb.New(k.spec.GetMaxActiveAge().AsDuration()),
		}
		response.Keyrings = append(response.Keyrings, message)
		for _, e := range k.Epochs {
			secret, ok := s.vault.copy(e.Sealed)
			if !ok {
				wipe(response)
				return nil, false
			}
			message.Epochs = append(message.Epochs, &resealv1.EpochSecret{Epoch: epochMessage(e.Epoch, k.spec), Secret: secret})
		}
	}
	return response, true
}

// ack takes what the edge holds since a response is in force. It may say so again
// when that has changed on its own, for example when it stopped encrypting.
func (h *hold) ack(message *resealv1.HoldRequest) error {
	serial := message.GetSerial()
	if serial == 0 || serial > h.serial {
		return status.Errorf(codes.InvalidArgument, "serial: %d was not sent", serial)
	}
	if err := checkHeld(message); err != nil {
		return err
	}
	if serial < h.serial {
		return nil // it crossed the next response
	}
	h.answered = true
	h.deadline.Stop()
	h.line.Wake() // a newer set may wait
	held := map[string]coverOf{}
	for _, keyring := range message.GetKeyrings() {
		i := slices.IndexFunc(h.sent.keyrings, func(k setOf) bool { return k.name == keyring.GetName() })
		if i >= 0 {
			held[keyring.GetName()] = h.sent.keyrings[i].covered(keyring)
		}
	}
	h.server.roster.acked(h.entry, held)
	return nil
}

// covered is what counts of an ack: epochs that were sent.
func (k setOf) covered(held *resealv1.HeldKeyring) coverOf {
	ring := k.ring()
	numbers := slices.DeleteFunc(slices.Clone(held.GetEpochs()), func(number uint64) bool {
		_, sent := ring.Find(number)
		return !sent
	})
	of := coverOf{Record: k.ID, Held: spansOf(numbers)}
	if of.Held.has(held.GetActive()) {
		of.Active = held.GetActive()
	}
	return of
}

func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}
