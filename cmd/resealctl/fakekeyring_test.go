package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// fakeKeyrings are the keyrings of the control plane in memory: default, with a
// retired epoch 6 and an active epoch 7, and empty, without epochs.
type fakeKeyrings struct {
	resealv1.UnimplementedKeyringServiceServer

	mu      sync.Mutex
	once    sync.Once
	status  *resealv1.KeyringStatus
	looks   int  // at a prepared epoch
	stuck   bool // edge-2 acks nothing
	damaged bool // default can't be read
}

func (f *fakeKeyrings) set(edit func(*fakeKeyrings)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	edit(f)
}

func fakeTime(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(fakeEpoch.Add(d)) }

func (f *fakeKeyrings) load() {
	f.once.Do(func() {
		f.status = &resealv1.KeyringStatus{
			Name: "default",
			Epochs: []*resealv1.Epoch{
				{Number: 6, State: resealv1.EpochState_EPOCH_STATE_RETIRED, PreparedAt: fakeTime(0), ActivatedAt: fakeTime(time.Second),
					RetiredAt: fakeTime(time.Hour), EraseAt: timestamppb.New(time.Now().Add(13*time.Hour - time.Second))},
				{Number: 7, State: resealv1.EpochState_EPOCH_STATE_ACTIVE, PreparedAt: fakeTime(time.Hour), ActivatedAt: fakeTime(time.Hour)},
			},
			Edges: []*resealv1.EdgeCoverage{
				{Edge: "edge-1", Epochs: []uint64{6, 7}, Active: 7},
				{Edge: "edge-2", Epochs: []uint64{6, 7}, Active: 7},
			},
			NextRotation: timestamppb.New(time.Now().Add(time.Hour - time.Second)),
		}
	})
}

// Status acks for the edges and activates a prepared epoch at the third look.
func (f *fakeKeyrings) Status(_ context.Context, request *resealv1.StatusRequest) (*resealv1.StatusResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.load()
	if !slices.Contains([]string{"", "default", "empty"}, request.GetKeyring()) {
		return nil, status.Errorf(codes.NotFound, "Keyring/%s does not exist", request.GetKeyring())
	}
	f.look()
	current := proto.CloneOf(f.status)
	if f.damaged {
		current.Epochs, current.Problem = nil, "damaged record"
	}
	response := &resealv1.StatusResponse{Leader: "127.0.0.1:7443"}
	for _, k := range []*resealv1.KeyringStatus{current, {Name: "empty"}} {
		if request.GetKeyring() == "" || request.GetKeyring() == k.GetName() {
			response.Keyrings = append(response.Keyrings, k)
		}
	}
	return response, nil
}

func (f *fakeKeyrings) look() {
	newest := f.status.Epochs[len(f.status.Epochs)-1]
	if newest.GetState() != resealv1.EpochState_EPOCH_STATE_PREPARED {
		return
	}
	f.looks++
	f.status.Laggards = nil
	for _, e := range f.status.Edges {
		if f.stuck && e.GetEdge() == "edge-2" {
			f.status.Laggards = []string{"edge-2"}
		} else if !slices.Contains(e.Epochs, newest.GetNumber()) {
			e.Epochs = append(e.Epochs, newest.GetNumber())
		}
	}
	if f.looks%3 == 0 {
		f.activate(newest.GetNumber())
	}
}

func (f *fakeKeyrings) activate(number uint64) {
	for _, e := range f.status.Epochs {
		switch {
		case e.GetNumber() == number:
			e.State, e.ActivatedAt = resealv1.EpochState_EPOCH_STATE_ACTIVE, fakeTime(2*time.Hour)
		case e.GetState() == resealv1.EpochState_EPOCH_STATE_ACTIVE:
			e.State, e.RetiredAt, e.EraseAt = resealv1.EpochState_EPOCH_STATE_RETIRED, fakeTime(2*time.Hour), fakeTime(14*time.Hour)
		}
	}
	f.status.ActivationDeadline = nil
}

func (f *fakeKeyrings) prepare() uint64 {
	number := uint64(1)
	if len(f.status.Epochs) > 0 {
		number = f.status.Epochs[len(f.status.Epochs)-1].GetNumber() + 1
	}
	f.status.Epochs = append(f.status.Epochs, &resealv1.Epoch{
		Number: number, State: resealv1.EpochState_EPOCH_STATE_PREPARED, PreparedAt: fakeTime(2 * time.Hour)})
	f.status.ActivationDeadline = timestamppb.New(time.Now().Add(5*time.Minute + time.Second))
	f.status.NextRotation = nil
	return number
}

func (f *fakeKeyrings) Rotate(_ context.Context, request *resealv1.RotateRequest) (*resealv1.RotateResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.load()
	switch name := cmp.Or(request.GetKeyring(), "default"); {
	case name == "empty":
		return nil, status.Error(codes.FailedPrecondition, `keyring "empty" has no epoch yet, its first one is about to be made`)
	case name != "default":
		return nil, status.Errorf(codes.NotFound, "Keyring/%s does not exist", name)
	case f.status.GetActivationDeadline() != nil:
		return nil, status.Error(codes.FailedPrecondition, `a rotation of keyring "default" is under way: epoch 8 is prepared`)
	}
	return &resealv1.RotateResponse{Epoch: f.prepare()}, nil
}

func (f *fakeKeyrings) Revoke(_ context.Context, request *resealv1.RevokeRequest) (*resealv1.RevokeResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.load()
	if request.GetAll() == (len(request.GetEpochs()) > 0) {
		return nil, status.Error(codes.InvalidArgument, "epochs: name at least one, or set all")
	}
	if request.GetKeyring() != "default" {
		return nil, status.Errorf(codes.NotFound, "Keyring/%s does not exist", request.GetKeyring())
	}
	if f.damaged {
		return &resealv1.RevokeResponse{Active: 1}, nil
	}
	numbers := request.GetEpochs()
	if len(numbers) == 0 {
		for _, e := range f.status.Epochs {
			numbers = append(numbers, e.GetNumber())
		}
	}
	response := &resealv1.RevokeResponse{Epochs: numbers, Active: 7}
	for _, number := range numbers {
		e := findEpoch(f.status, number)
		if e == nil {
			return nil, status.Error(codes.NotFound, fmt.Sprintf(`keyring "default" has no epoch %d`, number))
		}
		switch e.GetState() {
		case resealv1.EpochState_EPOCH_STATE_ACTIVE:
			response.Active = 8
			response.TicketAge = durationpb.New(max(response.GetTicketAge().AsDuration(), 2*time.Hour+12*time.Minute+1))
		case resealv1.EpochState_EPOCH_STATE_RETIRED:
			response.TicketAge = durationpb.New(5 * time.Hour)
		}
	}
	if request.GetDryRun() {
		return response, nil
	}
	if response.Active == 8 {
		f.prepare()
		f.activate(8)
	}
	f.status.Epochs = slices.DeleteFunc(f.status.Epochs, func(e *resealv1.Epoch) bool { return slices.Contains(numbers, e.GetNumber()) })
	return response, nil
}
