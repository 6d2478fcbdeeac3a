// Package admin serves the AdminService: it checks requests, asks the store
// and turns errors into gRPC status.
package admin

import (
	"context"
	"log/slog"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// maxResources bounds the resources that one call names.
	maxResources = 10_000
	// maxMessage bounds the message of a change, in bytes.
	maxMessage = 1024
)

// Store is where the resources are. Its methods may be called concurrently.
type Store interface {
	// Snapshot is the newest configuration, never nil. It must not be changed.
	Snapshot() *resealv1.Snapshot
	// Next waits for a configuration whose revision is above after. It may
	// skip revisions. When revisions start anew it returns the first one.
	Next(ctx context.Context, after int64) (*resealv1.Snapshot, error)
	// Redact is a resource without its secrets. It may be the argument itself
	// when there are none.
	Redact(*resealv1.Resource) *resealv1.Resource

	// Apply, Delete and Rollback make a change as a whole or not at all.
	// An error that has CurrentRevision() int64 means that the expected
	// revision isn't the current one.
	Apply(ctx context.Context, author string, req *resealv1.ApplyRequest) (*resealv1.ApplyResponse, error)
	Delete(ctx context.Context, author string, req *resealv1.DeleteRequest) (*resealv1.DeleteResponse, error)
	Rollback(ctx context.Context, author string, req *resealv1.RollbackRequest) (*resealv1.RollbackResponse, error)
	// Revisions lists the kept revisions, newest first.
	Revisions(ctx context.Context, req *resealv1.ListRevisionsRequest) (*resealv1.ListRevisionsResponse, error)
}

// ErrorCode is the gRPC code of the errors that are Is.
type ErrorCode struct {
	Is   error
	Code codes.Code
}

// Config configures the service. It is read by New.
type Config struct {
	// Store holds the resources. Required.
	Store Store
	// Author is the name of the caller, for the history. Default: none.
	Author func(context.Context) string
	// Codes are the codes of the store's errors; the first match counts.
	// Violations, conflicts and context errors need no entry. Errors without
	// entry are Internal, and only the log says what they were.
	Codes []ErrorCode
	// Validate checks the fields of one resource. Default: anything is valid.
	Validate func(*resealv1.Resource) []*resealv1.Violation
	// Annotate adds to kept revisions what became of them on their way to the edges.
	// Default: nothing.
	Annotate func([]*resealv1.Revision)
	// ReadAudit serves the method of that name. Default: there is no audit log.
	ReadAudit func(*resealv1.ReadAuditRequest, grpc.ServerStreamingServer[resealv1.ReadAuditResponse]) error
	// Logger gets changes and internal errors. Default: slog.Default().
	Logger *slog.Logger
}

type server struct {
	resealv1.UnimplementedAdminServiceServer
	cfg Config
}

// New makes the service. Who may call what is for an interceptor to decide.
func New(cfg Config) resealv1.AdminServiceServer {
	if cfg.Author == nil {
		cfg.Author = func(context.Context) string { return "" }
	}
	if cfg.Validate == nil {
		cfg.Validate = func(*resealv1.Resource) []*resealv1.Violation { return nil }
	}
	if cfg.Annotate == nil {
		cfg.Annotate = func([]*resealv1.Revision) {}
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	return &server{cfg: cfg}
}

// Apply implements the method of AdminService.
func (s *server) Apply(ctx context.Context, req *resealv1.ApplyRequest) (*resealv1.ApplyResponse, error) {
	if err := s.checkApply(req); err != nil {
		return nil, s.status(ctx, "Apply", err)
	}
	author := s.cfg.Author(ctx)
	resp, err := s.cfg.Store.Apply(ctx, author, req)
	if err != nil {
		return nil, s.status(ctx, "Apply", err)
	}
	s.logChange(ctx, "apply", author, resp.GetRevision(), len(resp.GetChanges()), req.GetDryRun())
	return resp, nil
}

// Delete implements the method of AdminService.
func (s *server) Delete(ctx context.Context, req *resealv1.DeleteRequest) (*resealv1.DeleteResponse, error) {
	if err := checkDelete(req); err != nil {
		return nil, s.status(ctx, "Delete", err)
	}
	author := s.cfg.Author(ctx)
	resp, err := s.cfg.Store.Delete(ctx, author, req)
	if err != nil {
		return nil, s.status(ctx, "Delete", err)
	}
	s.logChange(ctx, "delete", author, resp.GetRevision(), len(resp.GetChanges()), req.GetDryRun())
	return resp, nil
}

// Rollback implements the method of AdminService.
func (s *server) Rollback(ctx context.Context, req *resealv1.RollbackRequest) (*resealv1.RollbackResponse, error) {
	if err := checkRollback(req); err != nil {
		return nil, s.status(ctx, "Rollback", err)
	}
	author := s.cfg.Author(ctx)
	resp, err := s.cfg.Store.Rollback(ctx, author, req)
	if err != nil {
		return nil, s.status(ctx, "Rollback", err)
	}
	s.logChange(ctx, "rollback", author, resp.GetRevision(), len(resp.GetChanges()), req.GetDryRun())
	return resp, nil
}

// ReadAudit implements the method of AdminService.
func (s *server) ReadAudit(req *resealv1.ReadAuditRequest, stream grpc.ServerStreamingServer[resealv1.ReadAuditResponse]) error {
	if s.cfg.ReadAudit == nil {
		return s.UnimplementedAdminServiceServer.ReadAudit(req, stream)
	}
	return s.cfg.ReadAudit(req, stream)
}

// ListRevisions implements the method of AdminService.
func (s *server) ListRevisions(ctx context.Context, req *resealv1.ListRevisionsRequest) (*resealv1.ListRevisionsResponse, error) {
	if err := checkListRevisions(req); err != nil {
		return nil, s.status(ctx, "ListRevisions", err)
	}
	resp, err := s.cfg.Store.Revisions(ctx, req)
	if err != nil {
		return nil, s.status(ctx, "ListRevisions", err)
	}
	s.cfg.Annotate(resp.GetRevisions())
	return resp, nil
}

// logChange is the trace in the log that a change leaves, besides the history.
func (s *server) logChange(ctx context.Context, method, author string, revision int64, changes int, dryRun bool) {
	s.cfg.Logger.InfoContext(ctx, "change", "method", method, "author", author,
		"revision", revision, "resources", changes, "dry_run", dryRun)
}
